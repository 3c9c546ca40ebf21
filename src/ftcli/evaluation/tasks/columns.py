"""Reading the columns of a task's rows, with errors that name file, line and column."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from ftcli.errors import DataError, Problem, did_you_mean


def column(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a column.

    Raises:
        DataError: the row has no such column.
    """
    if name not in row:
        hint = did_you_mean(name, list(map(str, row))) or f"columns: {', '.join(map(str, row))}"
        raise DataError("a row cannot be read", [Problem(where, f"column `{name}` is missing", hint)])
    return row[name]


def kind_of(value: Any) -> str:
    """What a value is, as JSON calls it.

    Example:
        >>> [kind_of(value) for value in (None, True, 3, 0.5, {}, [])]
        ['null', 'a boolean', 'a number', 'a number', 'an object', 'a list']
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    kinds: dict[type, str] = {int: "a number", float: "a number", dict: "an object", list: "a list", str: "a text"}
    return kinds.get(type(value), type(value).__name__)


def text_column(row: Mapping[str, Any], name: str, where: str) -> str:
    """The text in a column; a number counts as its text.

    Raises:
        DataError: it is missing, or neither text nor number.
    """
    value = column(row, name, where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError("a row cannot be read", [Problem(where, f"column `{name}` is {type(value).__name__}, not a text", None)])
    return str(value)


def texts_column(row: Mapping[str, Any], name: str, where: str) -> list[str]:
    """The texts of a column that holds a list of them; a text alone is a list of one.

    Raises:
        DataError: it is missing, empty, or holds something else.
    """
    value = column(row, name, where)
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or not all(isinstance(item, str | int | float) for item in items):
        raise DataError("a row cannot be read", [Problem(where, f"column `{name}` is not a list of texts", "a JSON list")])
    return [str(item) for item in items]


def fill(template: str, row: Mapping[str, Any], where: str) -> str:
    """`template` with every {column} replaced by the row's text.

    Raises:
        DataError: a column is missing.
    """
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(text_column(row, name, where))
    return "".join(parts)


def after_last_column(template: str) -> str:
    """What a template says behind its last column.

    Example:
        >>> after_last_column("Q: {question}\\nIn short:")
        '\\nIn short:'
    """
    text = ""
    for literal, name, _, _ in string.Formatter().parse(template):
        text = text + literal if name is None else ""
    return text


def checked_template(template: str) -> str:
    """`template`, if its braces pair and name columns.

    Raises:
        ValueError: they do not.
    """
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is not None and (not name or spec or conversion):
            raise ValueError(f"`{{{name}}}` is not a column in braces, such as `{{question}}`")
    return template
