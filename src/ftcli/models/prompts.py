"""Prompts as people give them - a line of text, a row of a JSONL file - and as the model is to continue them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.errors import DataError, Problem, UsageError

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer: one text, or a conversation."""

    text: str | None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None
    adapter: str | None = None
    """Which of several adapters is to answer; None where the prompt does not say."""


def read_prompts(lines: Iterable[str], name: str) -> list[Prompt]:
    """One prompt per line that is not blank; where the first begins with `{`, every line is a JSON object.

    Args:
        name: what to call the lines when something is wrong with one.

    Raises:
        DataError: a line is no JSON object, or holds neither `prompt` nor `messages`; names every such line.
        UsageError: there is no prompt.
    """
    numbered = [(number, line.rstrip("\r\n")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UsageError(f"there is no prompt in {name}")
    if not numbered[0][1].lstrip("\ufeff").lstrip().startswith("{"):
        return [Prompt(line.removeprefix("\ufeff")) for _, line in numbered]
    rows = [_read_row(line.removeprefix("\ufeff"), f"{name}:{number}") for number, line in numbered]
    problems = [row for row in rows if isinstance(row, Problem)]
    if problems:
        raise DataError(f"{len(problems)} of the {len(numbered)} prompts cannot be read", problems)
    return [row for row in rows if isinstance(row, Prompt)]


def _read_row(line: str, where: str) -> Prompt | Problem:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Problem(where, f"is not valid JSON: {error}", "a file of plain prompts must not begin with `{`")
    if not isinstance(row, dict):
        return Problem(where, "is not a JSON object")
    if not _is_unicode(row):
        return Problem(where, "holds half of a character: a lone surrogate", "write the character whole, as text or as a pair of escapes")
    adapter = row.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        return Problem(where, f"`adapter` is {json.dumps(adapter)}, and not the name of one")
    if isinstance(row.get("prompt"), str):
        return Prompt(row["prompt"], adapter=adapter)
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return Problem(where, f"has neither `prompt` nor `messages` (keys: {', '.join(row) or 'none'})")
    try:
        return _conversation(messages, row.get("tools"), adapter, where)
    except DataError as error:
        return error.problems[0]


def _conversation(messages: list[Any], tools: Any, adapter: str | None, where: str) -> Prompt | Problem:
    """The conversation as rows of training data are read, up to where something is to be answered."""
    from ftcli.data.messages import fields_of, read_messages, read_tools

    offered = read_tools(tools, where, "tools")
    fields = list(fields_of(read_messages(messages, where, "messages"))) if messages else []
    while fields and fields[-1]["role"] == "assistant":
        fields.pop()
    if not fields:
        return Problem(where, "`messages` holds nothing to answer")
    return Prompt(None, tuple(fields), None if offered is None else tuple(offered), adapter)


def _is_unicode(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def render_prompt(prompt: Prompt, tokenizer: Tokenizer, *, system: str | None = None, raw: bool = False) -> str:
    """The text that the model continues: through the chat template where there is one, unless `raw`.

    Raises:
        UsageError: a conversation or a system text is asked for where no template is used.
        DataError: the template refuses the conversation.
    """
    if raw or tokenizer.chat_template is None:
        if prompt.text is None or system is not None:
            what = "a conversation" if prompt.text is None else "--system"
            reason = "--raw uses none" if raw else "the tokenizer has none"
            raise UsageError(f"{what} needs a chat template, and {reason}")
        return prompt.text
    messages = list(prompt.messages) if prompt.text is None else [{"role": "user", "content": prompt.text}]
    if system is not None:
        own = messages[1:] if messages[0].get("role") == "system" else messages
        messages = [{"role": "system", "content": system}, *own]
    return tokenizer.render(messages, tools=prompt.tools, add_generation_prompt=True)
