"""A text with a label, several labels, or a number: what classifiers learn from."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import field_validator

from ftcli.data.example import Example, Piece, path_example
from ftcli.data.messages import bad_row, column_of, kind_of, read_text, read_weight
from ftcli.spec import Spec

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

_TEXTS = ("text", "sentence", "content")
_LABELS = ("label", "labels")
_PAIRS = ("text_pair", "sentence_pair")
_PLACE = re.compile(r"\{(text|text_pair)\}")


class Label(Spec):
    """A row is a text and what it is: one label, a list of labels, or a number.

    Where the tokenizer has tokens for the beginning and the end of a classified text (`[CLS]` and `[SEP]` of encoders), they are
    put around it.
    """

    kind: Literal["label"] = "label"
    text: str = "text"
    """Column with the text."""
    label: str = "label"
    """Column with the label: a text, a number, or a list of them."""
    text_pair: str | None = None
    """Column with a second text that belongs to the first, such as the answer to a question."""
    template: str | None = None
    """What the model reads, with `{text}` and `{text_pair}` in it, such as `"Review: {text}\\nOpinion:"`; the default is the text, and
    the second text in a line of its own or behind the tokenizer's separator."""
    weight: str | None = "weight"
    """Column with the weight of the row, where rows have one; null reads none."""

    @field_validator("template")
    @classmethod
    def _names_the_text(cls, template: str | None) -> str | None:
        if template is not None and "{text}" not in template:
            raise ValueError(f"found `{template}`, allowed: a text with `{{text}}` in it")
        return template

    @classmethod
    def detect(cls, columns: Collection[str], rows: Sequence[Mapping[str, Any]]) -> Self | None:
        """The settings that would read these rows, None when they have no pair of known columns."""
        for text in _TEXTS:
            for label in _LABELS:
                if {text, label} <= set(columns) and any(isinstance(row.get(text), str) for row in rows):
                    return cls(text=text, label=label, text_pair=next((pair for pair in _PAIRS if pair in columns), None))
        return None

    def required_columns(self) -> tuple[str, ...]:
        return tuple(column for column in (self.text, self.label, self.text_pair) if column is not None)

    def optional_columns(self) -> tuple[str, ...]:
        return (self.weight,) if self.weight is not None else ()

    def example(self, row: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Example:
        """The row as an example with its labels.

        Raises:
            DataError: a column is missing, the text is empty, or the label is none.
        """
        return self._example(row, tokenizer, where, _read_labels(column_of(row, self.label, where), where, self.label))

    def question(self, row: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> Example:
        """The row as an example of which the label is asked for; a column with the label need not be there.

        Raises:
            DataError: a column is missing, or the text is empty.
        """
        return self._example(row, tokenizer, where, ())

    def _example(self, row: Mapping[str, Any], tokenizer: Tokenizer, where: str, labels: tuple[str, ...]) -> Example:
        text = read_text(row, self.text, where)
        pair = read_text(row, self.text_pair, where) if self.text_pair is not None else None
        if not text.strip():
            raise bad_row(where, f"column `{self.text}` is empty")
        weight = read_weight(row.get(self.weight), where, f"column `{self.weight}`") if self.weight is not None else 1.0
        first, last = tokenizer.special.get("cls_token"), tokenizer.special.get("sep_token")
        is_encoder = first is not None and last is not None
        body = self._body(text, pair, last if is_encoder else None)
        example = path_example(
            [Piece(f"{first}{body}{last}" if is_encoder else body, weight, is_prompt=True)], add_bos=tokenizer.adds_bos and not is_encoder
        )
        return Example(example.segments, example.add_bos, labels)

    def _body(self, text: str, pair: str | None, separator: str | None) -> str:
        if self.template is not None:
            values = {"text": text, "text_pair": pair or ""}
            return _PLACE.sub(lambda match: values[match[1]], self.template)
        return text if pair is None else f"{text}{separator or chr(10)}{pair}"


def _read_labels(value: Any, where: str, column: str) -> tuple[str, ...]:
    """The labels in a column, each as text; a number keeps every digit."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(_label_text(item, where, column) for item in values)


def _label_text(value: Any, where: str, column: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    shown = "empty" if isinstance(value, str) else kind_of(value) if not isinstance(value, float) else f"`{value}`"
    raise bad_row(where, f"column `{column}` is {shown}, not a label", "a text, a number, or a list of them")
