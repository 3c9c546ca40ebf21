"""Plain text: every token is a target."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from ftcli.data.example import Example, Piece, path_example
from ftcli.data.messages import bad_row, read_text, read_weight
from ftcli.spec import Spec

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer


class Text(Spec):
    """A row is a text, and all of it is learnt: stories, articles, code, for continual pre-training."""

    kind: Literal["text"] = "text"
    text: str = "text"
    """Column with the text."""
    weight: str | None = "weight"
    """Column with the weight of the row, where rows have one; null reads none."""
    append_eos: bool = True
    """End every text with the EOS token, so that the model learns where texts stop."""

    @classmethod
    def detect(cls, columns: Collection[str], rows: Sequence[Mapping[str, Any]]) -> Self | None:
        """The settings that would read these rows, None when they have no text."""
        for column in ("text", "content"):
            if column in columns and any(isinstance(row.get(column), str) for row in rows):
                return cls(text=column)
        return None

    def required_columns(self) -> tuple[str, ...]:
        return (self.text,)

    def optional_columns(self) -> tuple[str, ...]:
        return (self.weight,) if self.weight is not None else ()

    def example(self, row: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Example:
        """The row as an example.

        Raises:
            DataError: it has no text.
        """
        text = read_text(row, self.text, where)
        if not text.strip():
            raise bad_row(where, f"column `{self.text}` is empty")
        weight = read_weight(row.get(self.weight), where, f"column `{self.weight}`") if self.weight is not None else 1.0
        end = tokenizer.end_of_text() if self.append_eos else ""
        return path_example([Piece(text + end, weight, is_prompt=False)], add_bos=tokenizer.adds_bos)
