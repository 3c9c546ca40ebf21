"""Prompt and completion, as plain text or as messages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from ftcli.data.example import Example, Piece, path_example
from ftcli.data.messages import bad_row, column_of, looks_like_messages, read_messages, read_text, read_tools, read_weight
from ftcli.data.template import chat_example
from ftcli.spec import Spec

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"), ("input", "output"))


class Completion(Spec):
    """A row is a prompt and what should follow it, joined as they are; the completion is learnt.

    When both are lists of messages they are rendered as one chat, and its last answer is learnt.
    """

    kind: Literal["completion"] = "completion"
    prompt: str = "prompt"
    """Column with the prompt."""
    completion: str = "completion"
    """Column with what follows."""
    tools: str | None = "tools"
    """Column with the tools the row offers, where rows have one and are messages."""
    weight: str | None = "weight"
    """Column with the weight of the row, where rows have one; null reads none."""
    append_eos: bool = True
    """End every completion with the EOS token, so that the model learns to stop."""

    @classmethod
    def detect(cls, columns: Collection[str], rows: Sequence[Mapping[str, Any]]) -> Self | None:
        """The settings that would read these rows, None when they have no pair of known columns."""
        # `instruction` makes `input` its second part, not a prompt
        if "instruction" in columns:
            return None
        for prompt, completion in _PAIRS:
            if prompt in columns and completion in columns and any(_is_pair(row.get(prompt), row.get(completion)) for row in rows):
                return cls(prompt=prompt, completion=completion)
        return None

    def required_columns(self) -> tuple[str, ...]:
        return (self.prompt, self.completion)

    def optional_columns(self) -> tuple[str, ...]:
        return tuple(column for column in (self.tools, self.weight) if column is not None)

    def example(self, row: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Example:
        """The row as an example.

        Raises:
            DataError: a column is missing or not a text, or the completion is empty.
        """
        weight = read_weight(row.get(self.weight), where, f"column `{self.weight}`") if self.weight is not None else 1.0
        if looks_like_messages(row.get(self.completion)):
            return self._chat(row, tokenizer, where, weight)
        prompt, completion = read_text(row, self.prompt, where), read_text(row, self.completion, where)
        if not completion.strip():
            raise bad_row(where, f"column `{self.completion}` is empty")
        end = tokenizer.end_of_text() if self.append_eos else ""
        pieces = [Piece(prompt, weight, is_prompt=True), Piece(completion + end, weight, is_prompt=False)]
        return path_example(pieces, add_bos=tokenizer.adds_bos)

    def _chat(self, row: Mapping[str, Any], tokenizer: Tokenizer, where: str, weight: float) -> Example:
        prompt = column_of(row, self.prompt, where)
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*read_messages(asked, where, self.prompt), *read_messages(row[self.completion], where, self.completion)]
        tools = read_tools(row.get(self.tools), where, self.tools) if self.tools is not None else None
        return chat_example(messages, tokenizer, where, tools=tools, weight=weight, turns="last")


def _is_pair(prompt: Any, completion: Any) -> bool:
    if looks_like_messages(completion):
        return isinstance(prompt, str) or looks_like_messages(prompt)
    return isinstance(prompt, str) and isinstance(completion, str)
