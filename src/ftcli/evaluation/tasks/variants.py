"""Several ways to ask the same: all are tried on some rows, and the best one is measured on others.

A way of asking rewrites rows before the task reads them, so it works for every kind of row that has a question: the last turn of the
user in a chat, or a column such as `question`, `prompt` or `instruction`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from ftcli.data.messages import looks_like_messages
from ftcli.data.sources import Source
from ftcli.errors import DataError, Problem
from ftcli.evaluation.tasks.columns import checked_template, fill
from ftcli.evaluation.tasks.questions import listed_rows
from ftcli.spec import ExpandedName, Spec

Row = dict[str, Any]
Rows = Sequence[tuple[str, Row]]
_QUESTION_COLUMNS = ("question", "prompt", "instruction", "query", "input")
_USERS = ("user", "human", "prompter")


def _with_question(template: str) -> str:
    """`template`, if it says where the question goes."""
    checked_template(template)
    if "{question}" not in template:
        raise ValueError("`{question}` is missing: it says where the question goes")
    return template


class Variant(Spec):
    """One way to ask."""

    name: ExpandedName
    """What the table of variants calls it."""
    prompt: Annotated[str, AfterValidator(_with_question)] = "{question}"
    """What is asked, with the question and other columns in braces."""
    system: str | None = None
    """System message of a chat, in the place of its own; before the question where rows are no chats. The default keeps the row's."""


class Variants(Spec):
    """Ways to ask, of which the best on validation rows is measured on the others."""

    prompts: tuple[Variant, ...] = Field(min_length=2)
    """The candidates; of equally good ones the first is taken."""
    validation: Source | None = None
    """Rows to choose on, but for those that ask what a measured row asks; the default is a share of the task's own, which are then not
    measured."""
    validation_share: float = Field(default=0.25, gt=0, lt=1)
    """Share of the task's different questions to choose on, where there is no `validation`; rows that ask the same are on one side."""
    limit: int | None = Field(default=None, ge=1)
    """Choose on so many rows at most, of the task's own that ask the same one counted; a larger value chooses better and costs that many
    answers for each candidate."""
    seed: int = Field(default=17, ge=0)
    """Of the draw of validation rows, which is the same for every model."""

    def divide(self, rows: Rows, keys: Sequence[str], others: Rows | None = None, other_keys: Sequence[str] = ()) -> Division:
        """Rows to choose on and rows to measure, which ask nothing in common: rows that ask the same are on one side.

        Args:
            keys: what each row asks.
            others: the rows of `validation`, where there is one; those that ask what a measured row asks are left out.
            other_keys: what each of these asks.

        Raises:
            DataError: one side would be empty.
        """
        if others is not None:
            return self._beside(rows, frozenset(keys), others, other_keys)
        different = list(dict.fromkeys(keys))
        size = max(1, round(self.validation_share * len(different)))
        size = size if self.limit is None else min(size, self.limit)
        places = random.Random(self.seed).sample(range(len(different)), min(size, len(different)))
        drawn = {different[place] for place in places}
        validation = [row for row, key in zip(rows, keys, strict=True) if key in drawn]
        rest = [row for row, key in zip(rows, keys, strict=True) if key not in drawn]
        if not validation or not rest:
            asked = "" if len(different) == len(rows) else f" of {len(different)} different question{'s' if len(different) > 1 else ''}"
            raise DataError(f"{len(rows)} rows{asked} are too few to choose a prompt on some and measure it on others")
        return Division(validation, rest)

    def _beside(self, rows: Rows, measured: frozenset[str], others: Rows, other_keys: Sequence[str]) -> Division:
        kept = [row for row, key in zip(others, other_keys, strict=True) if key not in measured]
        left = [row[0] for row, key in zip(others, other_keys, strict=True) if key in measured]
        if not kept:
            what = (
                f"all {len(others)} rows of `validation` are asked in the rows that are measured" if others else "`validation` has no rows"
            )
            hint = "give other rows, or leave `validation` out: then a share of the task's own rows is taken"
            raise DataError("a prompt cannot be chosen", [Problem("variants.validation", what, hint)])
        chosen = kept if self.limit is None else kept[: self.limit]
        if not left:
            return Division(chosen, rows)
        share = f"{len(left)} of {len(others)} rows of `validation`"
        return Division(chosen, rows, f"{share} are asked in the measured rows, too ({listed_rows(left)}): nothing was chosen on them")


@dataclass(frozen=True, slots=True)
class Division:
    """Rows to choose a way to ask on, and rows to measure."""

    validation: Rows
    measured: Rows
    left_out: str | None = None
    """What to tell of rows that are on neither side."""


@dataclass(frozen=True, slots=True)
class RowList:
    """Rows in memory, in the place of a source."""

    listed: Rows
    name: str
    bare: Rows = ()
    """The same rows without the passages in front of their questions; empty where there are none."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        return iter(self.listed)

    def label(self) -> str:
        return self.name

    def fingerprint(self) -> str:
        """Hash of the rows."""
        import hashlib
        import json

        return hashlib.sha256(json.dumps(self.listed, sort_keys=True, default=str).encode()).hexdigest()


def question_column(row: Mapping[str, Any], named: Sequence[str], where: str) -> str:
    """The column that holds the question.

    Args:
        named: columns that the task's settings name, tried first.

    Raises:
        DataError: there is none.
    """
    candidates = [*named, *(name for name in row if looks_like_messages(row[name])), *_QUESTION_COLUMNS]
    for name in candidates:
        if name in row and (isinstance(row[name], str) or looks_like_messages(row[name])):
            return name
    hint = f"columns: {', '.join(map(str, row))}; a question stands in one of {', '.join(_QUESTION_COLUMNS)}, or in messages"
    raise DataError("a row has no question that could be asked otherwise", [Problem(where, "no column holds a question", hint)])


def question_of_row(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text of the question: of a chat its last turn of the user.

    Raises:
        DataError: nobody asks.
    """
    value = row[column]
    if isinstance(value, str):
        return value
    message = value[_last_user(value, column, where)]
    text = message.get("content", message.get("value"))
    if not isinstance(text, str):
        raise DataError("a row cannot be asked otherwise", [Problem(where, f"column `{column}`: the question is no text", None)])
    return text


def asked(row: Mapping[str, Any], column: str, question: str, system: str | None, where: str) -> Row:
    """A copy of `row` with another question, and with `system` before it where there is one."""
    value = row[column]
    if isinstance(value, str):
        return {**row, column: question if system is None else f"{system}\n\n{question}"}
    place = _last_user(value, column, where)
    messages = [dict(message) for message in value]
    role, text = ("role", "content") if "role" in messages[place] else ("from", "value")
    messages[place][text] = question
    if system is not None:
        rest = messages[1:] if messages[0].get(role) == "system" else messages
        messages = [{role: "system", text: system}, *rest]
    return {**row, column: messages}


def _last_user(messages: Sequence[Mapping[str, Any]], column: str, where: str) -> int:
    for place in range(len(messages) - 1, -1, -1):
        if str(messages[place].get("role", messages[place].get("from"))) in _USERS:
            return place
    raise DataError("a row cannot be asked otherwise", [Problem(where, f"column `{column}` has no turn of a user", None)])


def rephrased(row: Mapping[str, Any], column: str, variant: Variant, where: str) -> Row:
    """`row`, asked as `variant` does."""
    question = fill(variant.prompt, {**row, "question": question_of_row(row, column, where)}, where)
    return asked(row, column, question, variant.system, where)
