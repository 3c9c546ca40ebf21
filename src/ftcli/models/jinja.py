"""Chat templates: Jinja in a sandbox, with the names and filters that templates of models count on.

Templates are programs that come with a model, so they run where they can reach nothing but their arguments.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftcli.errors import DataError, Problem, RequestError

# The names under which data sets keep what a model thought before it answered; templates read the first, gpt-oss the second.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` writes what stands inside and nothing else."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=64)
def compile_template(template: str) -> jinja2.Template:
    """The compiled template.

    Raises:
        RequestError: it is not valid Jinja; names the line.
    """
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        problem = Problem(f"model.template: line {error.lineno} of the template", str(error.message))
        raise RequestError("the chat template is not valid Jinja", [problem]) from error


def render_template(template: str, messages: Sequence[Mapping[str, Any]], **names: Any) -> str:
    """The conversation as text, byte for byte what transformers' `apply_chat_template` gives.

    Raises:
        DataError: the template refuses the conversation; its own words are in the problem.
    """
    compiled = compile_template(template)
    try:
        return compiled.render(messages=[_plain_message(message) for message in messages], **names)
    except jinja2.TemplateError as error:
        raise DataError("the chat template refuses a conversation", [Problem("", f"the chat template says: {error}")]) from error
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise DataError("the chat template fails on a conversation", [Problem("", f"the chat template fails: {error}")]) from error


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without empty keys, which templates would write as "None", and with reasoning under every name it is read by."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain
