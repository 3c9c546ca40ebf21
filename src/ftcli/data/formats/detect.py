"""The format that would read given rows, found from their columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ftcli.data.formats import Format
from ftcli.data.formats.chat import Chat
from ftcli.data.formats.completion import Completion
from ftcli.data.formats.instruction import Instruction
from ftcli.data.formats.label import Label
from ftcli.data.formats.text import Text
from ftcli.errors import DataError, Problem, did_you_mean

_FORMATS = (Chat, Completion, Instruction, Label, Text)
LANGUAGE_FORMATS = frozenset({"chat", "completion", "instruction", "text"})
"""Kinds of the formats that a language model learns from token by token."""
# Data whose format is known and which no objective has a use for.
_OTHER = ((("chosen", "rejected"), "preference pairs"), (("choices",), "multiple-choice questions"))


def detect_format(rows: Sequence[Mapping[str, Any]], where: str = "the data", kinds: frozenset[str] = LANGUAGE_FORMATS) -> Format:
    """The one format that reads these rows, with its columns set.

    Args:
        rows: the first rows of a source.
        where: the source, for errors.
        kinds: the formats that the objective can learn from; what a text with a label is, depends on it.

    Raises:
        DataError: no format reads them, or more than one does.
    """
    columns = list(dict.fromkeys(str(column) for row in rows for column in row))
    allowed = [kind for kind in _FORMATS if kind.model_fields["kind"].default in kinds]
    found = [settings for kind in allowed if (settings := kind.detect(columns, rows)) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"`{settings.kind}` ({', '.join(settings.required_columns())})" for settings in found)
        what = f"columns {_listed(columns)} fit several formats: {names}"
        raise DataError("the format is ambiguous", [Problem(where, what, f"say which: `format: {{kind: {found[0].kind}}}`")])
    raise DataError("the format is unknown", [_unknown(columns, where, allowed)])


# Columns that hold what a model is to answer, in data sets of many kinds: to leave one out is rarely meant.
_ANSWER_COLUMNS = frozenset(
    [
        "label",
        "labels",
        "label_text",
        "class",
        "category",
        "target",
        "targets",
        "answer",
        "answers",
        "completion",
        "response",
        "output",
        "solution",
        "summary",
        "translation",
        "sentiment",
        "rating",
        "score",
        "chosen",
        "rejected",
    ]
)


def unread_answer(settings: Format, columns: Collection[str]) -> str | None:
    """What to tell of a source with a column that looks like the answer and is not read; None where there is none.

    Example:
        >>> unread_answer(Text(), ["text", "label", "id"])
        'reads column text only; not read: label, id'
    """
    unread = unread_columns(settings, columns)
    if not any(column.lower() in _ANSWER_COLUMNS for column in unread):
        return None
    read = [column for column in columns if column not in unread]
    return f"reads column{'s' if len(read) > 1 else ''} {', '.join(read)} only; not read: {', '.join(unread)}"


def unread_columns(settings: Format, columns: Collection[str]) -> list[str]:
    """The columns of a source that its format does not look at."""
    return [column for column in columns if column not in (*settings.required_columns(), *settings.optional_columns())]


def _unknown(columns: Sequence[str], where: str, allowed: Sequence[Any]) -> Problem:
    for needed, name in _OTHER:
        if set(needed) <= set(columns):
            return Problem(where, f"columns {_listed(columns)} look like {name}, which this objective does not train on")
    # A near miss is worth more than the whole table of formats
    for kind in allowed:
        missing = [column for column in kind().required_columns() if column not in columns]
        near = [(column, next((other for other in columns if did_you_mean(column, [other])), None)) for column in missing]
        if near and all(other is not None for _, other in near):
            fields = ", ".join(f"{column}: {other}" for column, other in near)
            return Problem(where, f"columns {_listed(columns)} fit no format", f"set `format: {{kind: {kind().kind}, {fields}}}`")
    needs = ", ".join(f"{kind().kind} ({', '.join(kind().required_columns())})" for kind in allowed)
    example = f"{{kind: {allowed[-1]().kind}, text: {columns[0] if columns else 'body'}}}"
    hint = f"formats and their columns: {needs}; other names go into `format`, such as `{example}`"
    return Problem(where, f"columns {_listed(columns)} fit no format", hint)


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(columns[:10]) or "none"
    return f"({shown})" if len(columns) <= 10 else f"({shown}, ... and {len(columns) - 10} more)"
