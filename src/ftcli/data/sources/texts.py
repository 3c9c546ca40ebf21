"""Rows of a plain text file: the whole of it, its paragraphs, or its lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ftcli.data.sources.bytes import read_lines


def read_txt(path: Path, name: str, split: Literal["file", "paragraph", "line"]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a text file; a row is `{"text": ...}`, with LF line ends and without blank lines around it."""
    block: list[str] = []
    start = 1
    for number, line in enumerate(read_lines(path, name), start=1):
        plain = line.rstrip("\r\n") + "\n"
        if split == "line" or (split == "paragraph" and not plain.strip()):
            yield from _row(block, start)
            block = []
        if not block:
            if not plain.strip():
                continue
            start = number
        block.append(plain)
    yield from _row(block, start)


def _row(block: list[str], start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if block:
        yield start, {"text": "".join(block).rstrip("\n")}
