"""Rows of csv, tsv and parquet files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftcli.data.sources.bytes import read_lines, unreadable

Rows = Iterator[tuple[int, dict[str, Any]]]
# A quote that is never closed would take in the rest of the file as one field.
_LONGEST_FIELD = 1 << 26


def read_csv(path: Path, name: str) -> Rows:
    """(line, row) of a comma-separated file with a header; the line is where the row begins."""
    return _read_delimited(path, name, ",")


def read_tsv(path: Path, name: str) -> Rows:
    """(line, row) of a tab-separated file with a header; the line is where the row begins."""
    return _read_delimited(path, name, "\t")


def _read_delimited(path: Path, name: str, delimiter: str) -> Rows:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(read_lines(path, name), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for fields in reader:
            if fields and not header:
                header = _checked_header(fields, f"{name}:{line}", delimiter)
            elif fields:
                yield line, _row(header, fields, f"{name}:{line}", delimiter)
            line = reader.line_num + 1
    except csv.Error as error:
        hint = "a field with quotes, line ends or the delimiter in it stands in double quotes, and its quotes are doubled"
        raise unreadable(f"{name}:{line}", f"cannot be read as a row: {error}", hint) from error


def _checked_header(fields: list[str], where: str, delimiter: str) -> list[str]:
    header = [field.strip() for field in fields]
    if "" in header:
        raise unreadable(where, f"the header has no name for column {header.index('') + 1}")
    double = next((field for field in header if header.count(field) > 1), None)
    if double is not None:
        raise unreadable(where, f"the header names column `{double}` twice")
    other = {",": "\t", "\t": ","}[delimiter]
    if len(header) == 1 and (other in header[0] or ";" in header[0]):
        found = "a tab" if other == "\t" and other in header[0] else "`,`" if other in header[0] else "`;`"
        raise unreadable(where, f"the header is one column, and has {found} in it", "csv is cut at commas, tsv at tabs")
    return header


def _row(header: list[str], fields: list[str], where: str, delimiter: str) -> dict[str, Any]:
    if len(fields) != len(header):
        sign = "comma" if delimiter == "," else "tab"
        what = f"the row has {len(fields)} columns, the header {len(header)} ({', '.join(header)})"
        raise unreadable(where, what, f"a field with a {sign} in it has to stand in double quotes")
    return dict(zip(header, fields, strict=True))


def read_parquet(path: Path, name: str) -> Rows:
    """(number, row) of a parquet file, counted from 1; read batch by batch."""
    import pyarrow
    from pyarrow import parquet

    if path.suffix.lower() != ".parquet":
        raise unreadable(name, "is compressed from outside; parquet compresses by itself", "unpack it first")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(name, f"is not a parquet file that can be read: {str(error).splitlines()[0]}") from error
