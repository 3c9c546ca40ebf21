"""A chat template as a Go template, for Ollama: found by what the Jinja template writes, not by reading it.

Most templates write every message between two fixed texts that depend on its role, and a fixed text before an answer. These texts are
taken from probe conversations, and others must then be rendered alike; a template that does anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcli.errors import DataError, Problem, RequestError

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]
RAW = "{{ .Prompt }}"
"""For a model without a chat template: the text as it is."""
_WORDS = ("zebra", "quilt", "xylem")


def _messages(*contents: str, system: str | None = None) -> Messages:
    """A conversation of questions and answers in turn."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


BATTERY = (
    _messages("Hello"),
    _messages("One", "Two", "Three"),
    _messages("1 < 2 & 3", "a\n\nb", 'say "so"\\', "so", "?"),
    _messages("Hello", system="Be kind."),
    _messages("One", "Two", "{{ Three }}", system="Be {kind}.\nBe brief."),
)
"""Conversations that end with a question, as a server renders them."""


@dataclass(frozen=True, slots=True)
class TurnTexts:
    """The fixed texts of a template."""

    start: str
    """Before everything."""
    no_system: str
    """After it, where there is no system message."""
    around: Mapping[str, tuple[str, str]]
    """(before, after) a message, by role."""
    answer: str
    """Before an answer."""

    def render(self, messages: Messages) -> str:
        """The conversation, up to where the assistant goes on."""
        text = self.start + ("" if messages[0]["role"] == "system" else self.no_system)
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer

    def go(self, bos: str | None) -> str:
        """The Go template that writes the same.

        Args:
            bos: the text of a token that the runtime puts in front by itself, and the template must not.
        """
        start = self.start if bos is None else self.start.removeprefix(bos)
        system, user, assistant = (self.around[role] for role in ("system", "user", "assistant"))
        roles = [
            f'{{{{ if eq .Role "system" }}}}{_literal(system[0])}{{{{ .Content }}}}{_literal(system[1])}',
            f'{{{{ else if eq .Role "user" }}}}{_literal(user[0])}{{{{ .Content }}}}{_literal(user[1])}',
            f'{{{{ else if eq .Role "assistant" }}}}{_literal(assistant[0])}{{{{ .Content }}}}',
            f"{{{{ if not $last }}}}{_literal(assistant[1])}{{{{ end }}}}{{{{ end }}}}",
        ]
        no_system = f"{{{{ if not .System }}}}{_literal(self.no_system)}{{{{ end }}}}" if self.no_system else ""
        each = "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        last = f'{{{{ if and $last (ne .Role "assistant") }}}}{_literal(self.answer)}{{{{ end }}}}'
        return "".join([_literal(start), no_system, each, *roles, last, "{{ end }}"])


def _literal(text: str) -> str:
    """An action that writes `text`: its braces and spaces are then no part of the template."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def turn_texts(tokenizer: Tokenizer) -> TurnTexts:
    """The fixed texts of the tokenizer's template.

    Raises:
        RequestError: it writes something else than fixed texts around each message.
    """
    try:
        texts = _factored(tokenizer)
        different = [messages for messages in BATTERY if texts.render(messages) != tokenizer.render(messages, add_generation_prompt=True)]
    except (DataError, ValueError) as error:
        raise _untranslatable("it refuses a simple conversation, or leaves out part of it") from error
    if different:
        raise _untranslatable(f"it writes more than fixed texts around each message ({different[0][-1]['content']!r} shows it)")
    return texts


def _factored(tokenizer: Tokenizer) -> TurnTexts:
    """The texts, if there are only such: each is what two renderings share, or what is left of one.

    Raises:
        ValueError: a message is not in the text once.
    """
    first, second, third = _WORDS
    begin, to_answer, to_question, user_after = _between(tokenizer.render(_messages(first, second, third)), _WORDS)
    system_begin, from_system, _ = _between(tokenizer.render(_messages(first, system=third)), (third, first))
    user_before = _shared_end(_shared_end(begin, to_question), from_system)
    head = begin.removesuffix(user_before)
    start = _shared_start(head, system_begin)
    question = _messages(first)
    return TurnTexts(
        start=start,
        no_system=head.removeprefix(start),
        around={
            "system": (system_begin.removeprefix(start), from_system.removesuffix(user_before)),
            "user": (user_before, user_after),
            "assistant": (to_answer.removeprefix(user_after), to_question.removesuffix(user_before)),
        },
        answer=tokenizer.render(question, add_generation_prompt=True).removeprefix(tokenizer.render(question)),
    )


def _between(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and after `words`.

    Raises:
        ValueError: they are not there once each, in this order.
    """
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            raise ValueError(word)
        pieces.append(before)
    return [*pieces, text]


def _shared_start(first: str, second: str) -> str:
    """The beginning that both have."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return first[:length]


def _shared_end(first: str, second: str) -> str:
    return _shared_start(first[::-1], second[::-1])[::-1]


def _untranslatable(why: str) -> RequestError:
    hint = "train with `model.template: chatml` or `plain`, or write the Modelfile by hand beside `--to gguf`"
    return RequestError("the chat template cannot become a Go template", [Problem("model.template", why, hint)])
