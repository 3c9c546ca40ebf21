"""Instructions with an optional input, as in the Alpaca and Self-Instruct data sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from ftcli.data.example import Example, Piece, path_example
from ftcli.data.messages import Message, bad_row, read_text, read_weight
from ftcli.data.template import chat_example
from ftcli.spec import Spec

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

_OUTPUTS = ("output", "response", "answer", "completion")


class Instruction(Spec):
    """A row is an instruction, an optional input to it, and the output that is learnt."""

    kind: Literal["instruction"] = "instruction"
    instruction: str = "instruction"
    """Column with the instruction."""
    input: str | None = "input"
    """Column with the input to the instruction, where rows have one."""
    output: str = "output"
    """Column with the output."""
    system: str | None = "system"
    """Column with a system prompt, where rows have one."""
    weight: str | None = "weight"
    """Column with the weight of the row, where rows have one; null reads none."""
    style: Literal["auto", "chat", "plain"] = "auto"
    """`chat` renders with the chat template, `plain` under plain headings; `auto` is `chat` where there is a template."""

    @classmethod
    def detect(cls, columns: Collection[str], rows: Sequence[Mapping[str, Any]]) -> Self | None:
        """The settings that would read these rows, None when they have no instruction."""
        if "instruction" not in columns:
            return None
        for output in _OUTPUTS:
            if output in columns and any(isinstance(row.get("instruction"), str) and isinstance(row.get(output), str) for row in rows):
                second = next((name for name in ("input", "context") if name in columns), "input")
                return cls(input=second, output=output)
        return None

    def required_columns(self) -> tuple[str, ...]:
        return (self.instruction, self.output)

    def optional_columns(self) -> tuple[str, ...]:
        return tuple(column for column in (self.input, self.system, self.weight) if column is not None)

    def example(self, row: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Example:
        """The row as an example.

        Raises:
            DataError: a column is missing or not a text, or the output is empty.
        """
        instruction, output = read_text(row, self.instruction, where), read_text(row, self.output, where)
        extra = self._optional_text(row, self.input, where)
        system = self._optional_text(row, self.system, where)
        if not output.strip():
            raise bad_row(where, f"column `{self.output}` is empty")
        weight = read_weight(row.get(self.weight), where, f"column `{self.weight}`") if self.weight is not None else 1.0
        if self.style == "chat" or (self.style == "auto" and tokenizer.chat_template is not None):
            asked = instruction + (f"\n\n{extra}" if extra else "")
            turns = [("system", system)] * bool(system) + [("user", asked), ("assistant", output)]
            messages = [Message(fields={"role": role, "content": content}, weight=1.0) for role, content in turns]
            return chat_example(messages, tokenizer, where, weight=weight)
        prompt = (f"{system}\n\n" if system else "") + f"Instruction:\n{instruction}\n\n" + (f"Input:\n{extra}\n\n" if extra else "")
        pieces = [Piece(prompt + "Output:\n", weight, is_prompt=True), Piece(output + tokenizer.end_of_text(), weight, is_prompt=False)]
        return path_example(pieces, add_bos=tokenizer.adds_bos)

    def _optional_text(self, row: Mapping[str, Any], column: str | None, where: str) -> str:
        """The text in a column that may be missing or null."""
        return "" if column is None or row.get(column) is None else read_text(row, column, where)
