"""Rows of JSON Lines files and of JSON arrays, read piece by piece, with strict JSON (RFC 8259)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ftcli.data.messages import kind_of
from ftcli.data.sources.bytes import read_chunks, read_lines, unreadable

Rows = Iterator[tuple[int, dict[str, Any]]]
# A row that is longer is a file that was not meant to be read as rows.
_LONGEST_ROW = 1 << 28
# An error this near the end of what has been read may only mean that the rest is still to come: the longest token that can be
# cut there is `\ud83d\ude00`.
_NEAR_END = 16
_BLANK = " \t\n\r"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def read_jsonl(path: Path, name: str) -> Rows:
    """(line, row) of a file with one JSON object a line; blank lines are skipped."""
    for number, line in enumerate(read_lines(path, name), start=1):
        text = line.strip(_BLANK)
        if text:
            where = f"{name}:{number}"
            yield number, _as_row(_parse_line(text, where), text, where)


def _parse_line(text: str, where: str) -> Any:
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        hint = "JSON Lines has one object a line; a file that is one array is named .json" if text in "[{" else None
        raise unreadable(where, f"is not valid JSON: {error.msg} at column {error.colno}{_shown(text, error.pos)}", hint) from error
    except (ValueError, RecursionError) as error:
        raise unreadable(where, f"is not valid JSON: {_reason(error)}") from error
    if end != len(text):
        hint = "JSON Lines has one object a line"
        raise unreadable(where, f"is not valid JSON: something follows the value at column {end + 1}{_shown(text, end)}", hint)
    return value


def read_json(path: Path, name: str) -> Rows:
    """(line, row) of a JSON file that holds an array of objects, or objects one after the other; the line is where the row begins."""
    stream = _Stream(path, name)
    first = stream.peek()
    if first == "[":
        yield from _array_rows(stream)
    elif first == "{":
        yield from _object_rows(stream)
    elif first:
        value, _ = stream.value()
        stream.expect_end()
        raise unreadable(f"{name}:{stream.line}", f"holds {kind_of(value)}, not a list of objects")


def _array_rows(stream: _Stream) -> Rows:
    stream.skip(1)
    if stream.peek() == "]":
        stream.skip(1)
        stream.expect_end()
        return
    while True:
        stream.peek()
        line = stream.line
        value, text = stream.value()
        yield line, _as_row(value, text, f"{stream.name}:{line}")
        separator = stream.peek()
        if separator not in (",", "]"):
            raise stream.invalid("expecting `,` or `]` after a row")
        stream.skip(1)
        if separator == "]":
            stream.expect_end()
            return


def _object_rows(stream: _Stream) -> Rows:
    """Objects one after the other: many data sets name JSON Lines `.json`. A single object is no list of rows."""
    line = stream.line
    value, text = stream.value()
    if not stream.peek():
        raise _single_object(value, f"{stream.name}:{line}")
    while True:
        yield line, _as_row(value, text, f"{stream.name}:{line}")
        following = stream.peek()
        if not following:
            return
        if following != "{":
            raise stream.invalid("expecting another object or the end")
        line = stream.line
        value, text = stream.value()


def _single_object(value: dict[str, Any], where: str) -> Exception:
    lists = [key for key, content in value.items() if isinstance(content, list)]
    if len(lists) == 1 and all(isinstance(row, dict) for row in value[lists[0]]):
        return unreadable(where, "holds one object, not a list of rows", f"the rows seem to be under `{lists[0]}`; write that list alone")
    if lists:
        return unreadable(where, f"holds one object of columns ({', '.join(lists[:5])}), not a list of rows", "write one object a row")
    return unreadable(where, "holds one object, not a list of rows", "a JSON Lines file with one row is named .jsonl")


def _as_row(value: Any, text: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        is_array = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        hint = "an array of rows is read from a file named .json" if is_array else None
        raise unreadable(where, f"the row is {kind_of(value)}, not an object with columns", hint)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise unreadable(where, f"has half a character: {error.object[error.start : error.start + 1]!r} is a lone surrogate") from error
    return value


class _Stream:
    """A JSON file read in chunks: what has been used is forgotten, and the line is counted."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.line = 1
        self._chunks = read_chunks(path, name)
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """The next character that is not blank, or "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self.skip(1)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(1):
                return ""

    def skip(self, count: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def value(self) -> tuple[Any, str]:
        """(value, its text) of the JSON value that begins here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                valid = error.pos - self._at
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _NEAR_END
                if cut and self._more(len(self._text) - self._at):
                    continue
                self.skip(valid)
                raise self.invalid(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self.invalid(_reason(error)) from error
            # A number that ends with the chunk may go on in the next
            length = end - self._at
            if end == len(self._text) and self._text[end - 1] not in '"}]' and self._more(1):
                continue
            text = self._text[self._at : self._at + length]
            self.skip(length)
            return value, text

    def expect_end(self) -> None:
        if self.peek():
            raise self.invalid("something follows the end of the value")

    def invalid(self, reason: str) -> Exception:
        return unreadable(f"{self.name}:{self.line}", f"is not valid JSON: {reason}{_shown(self._text, self._at)}")

    def _more(self, count: int) -> bool:
        """Read at least `count` characters more; a growing count makes retries of a long value cost no more than its length."""
        parts = [self._text[self._at :]]
        if len(parts[0]) > _LONGEST_ROW:
            raise self.invalid(f"a value of more than {_LONGEST_ROW >> 20} MiB")
        read = 0
        for chunk in self._chunks:
            parts.append(chunk)
            read += len(chunk)
            if read >= count:
                break
        self._text, self._at = "".join(parts), 0
        return read > 0


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _shown(text: str, at: int) -> str:
    part = text[at : at + 30]
    return f", found {part!r}" if part else ", found the end"
