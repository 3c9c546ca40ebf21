"""A pool of rows, read in chunks as often as needed, and copied out as it stands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftcli.data.leakage import read_text as texts_of_row
from ftcli.data.messages import read_text as text_in_column
from ftcli.data.sources.bytes import read_lines
from ftcli.data.sources.file import File

CHUNK_ROWS = 2000
CHUNK_CHARS = 4_000_000
_TEXT_COLUMNS = ("text", "content")
_LINE_SUFFIXES = (".jsonl", ".ndjson")
_BLANK = " \t\n\r"
Split = Literal["file", "paragraph", "line"]
SPLITS: tuple[Split, ...] = ("file", "paragraph", "line")


@dataclass(frozen=True)
class Chunk:
    """Some rows in a row."""

    first: int
    """Index of its first row in the pool."""
    source: int
    """Which source all of them are of."""
    wheres: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Chosen:
    """A row that is copied out."""

    index: int
    where: str
    text: str
    raw: str | None
    """The line as it stands in its file; None where rows are no lines."""
    row: dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Rows of files, one after the other."""

    sources: tuple[File, ...]
    column: str | None = None
    """Where the text stands; without it `text` or `content`, else every text of the row."""

    def labels(self) -> tuple[str, ...]:
        """A name for each source, told apart by their number where two files are called the same."""
        names = [source.label() for source in self.sources]
        return tuple(name if names.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(names))

    def rows(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(source, where, row) of every row."""
        for place, source in enumerate(self.sources):
            for where, row in source.rows():
                yield place, where, row

    def chunks(self) -> Iterator[Chunk]:
        """All rows, a bounded number of rows and characters at a time."""
        first = 0
        for place, source in enumerate(self.sources):
            wheres: list[str] = []
            texts: list[str] = []
            chars = 0
            for where, row in source.rows():
                wheres.append(where)
                texts.append(self.text(row, where))
                chars += len(texts[-1])
                if len(texts) == CHUNK_ROWS or chars >= CHUNK_CHARS:
                    yield Chunk(first, place, tuple(wheres), tuple(texts))
                    first += len(texts)
                    wheres, texts, chars = [], [], 0
            if texts:
                yield Chunk(first, place, tuple(wheres), tuple(texts))
                first += len(texts)

    def text(self, row: dict[str, Any], where: str) -> str:
        """The text of a row.

        Raises:
            DataError: the named column is not there, or holds no text.
        """
        if self.column is not None:
            return text_in_column(row, self.column, where)
        for column in _TEXT_COLUMNS:
            if isinstance(row.get(column), str):
                return str(row[column])
        found = texts_of_row(row, where)
        return f"{found.question}\n{found.answer}" if found.answer else found.question

    def texts(self) -> list[str]:
        """The text of every row: of a small set only."""
        return [self.text(row, where) for _, where, row in self.rows()]

    @property
    def is_lines(self) -> bool:
        """Can rows be copied as they stand in their files: are they lines of JSON, or all of them lines of text?"""
        return all(map(is_json_lines, self.sources)) or all(map(_is_text_lines, self.sources))

    @property
    def output_suffix(self) -> str:
        """Of the file that rows are copied to."""
        return ".txt" if self.sources and all(map(_is_text_lines, self.sources)) else ".jsonl"

    def chosen(self, wanted: Sequence[int]) -> Iterator[Chosen]:
        """The rows of these indices, in the order of the pool; only they are parsed where rows are lines.

        Args:
            wanted: sorted.
        """
        asked = iter(wanted)
        want = next(asked, None)
        index = 0
        for source in self.sources:
            for where, raw, row in _raw_rows(source, self.is_lines):
                if index == want:
                    values = row if row is not None else _parsed(source, raw, where)
                    yield Chosen(index, where, self.text(values, where), raw, values)
                    want = next(asked, None)
                    if want is None:
                        return
                index += 1

    def num_lines(self) -> int | None:
        """About how many rows there are, counted in lines without parsing; None where rows are no lines."""
        if not self.is_lines:
            return None
        return sum(1 for source in self.sources for file in source.files() for _ in read_lines(file, file.name))


def open_sources(names: Sequence[str], split: Split = "file") -> tuple[File, ...]:
    """The files, globs, folders and built-in data sets of these names."""
    from ftcli.builtin import catalogue

    paths = [str(catalogue.dataset_path(name.removeprefix("builtin:"))) if name.startswith("builtin:") else name for name in names]
    return tuple(File(path=path, split=split) for path in paths)


def is_json_lines(source: File) -> bool:
    return all(_bare_name(file).endswith(_LINE_SUFFIXES) for file in source.files())


def _is_text_lines(source: File) -> bool:
    return source.split == "line" and all(_bare_name(file).endswith(".txt") for file in source.files())


def _bare_name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").removesuffix(".zst")


def _raw_rows(source: File, is_lines: bool) -> Iterator[tuple[str, str | None, dict[str, Any] | None]]:
    """(where, line, row) of each row: the line alone where lines are rows, else the row alone."""
    if not is_lines:
        yield from ((where, None, row) for where, row in source.rows())
        return
    is_json = is_json_lines(source)
    files = source.files()
    root = files[0].parent if len(files) == 1 else Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        name = str(file.relative_to(root))
        for number, line in enumerate(read_lines(file, name), start=1):
            if line.strip(_BLANK) if is_json else line.strip():
                yield f"{name}:{number}", line, None


def _parsed(source: File, raw: str | None, where: str) -> dict[str, Any]:
    assert raw is not None
    values: dict[str, Any] = json.loads(raw) if is_json_lines(source) else {"text": raw.rstrip("\r\n")}
    return values
