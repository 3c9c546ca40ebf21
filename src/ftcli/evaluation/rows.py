"""The rows of a result, on the disk: a hundred thousand of them take no memory, and read like a list."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

Row = dict[str, Any]


class Rows(Sequence[Row]):
    """Rows written one after the other as lines of JSON, and read back when asked for; memory holds eight bytes for each."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed with the object
        self._ends = array("q", [0])
        for row in rows:
            self.append(row)

    @staticmethod
    def of_file(path: Path) -> Rows:
        """The rows that `write` left at `path`."""
        found = Rows()
        found._file.close()
        found._file = path.open("rb")
        for line in found._file:
            found._ends.append(found._ends[-1] + len(line))
        return found

    def __del__(self) -> None:
        self._file.close()

    def append(self, row: Row) -> None:
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        self._file.seek(self._ends[-1])
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def lines(self) -> Iterator[bytes]:
        """Every row as it is written."""
        for place in range(len(self)):
            yield self._line(place)

    def _line(self, place: int) -> bytes:
        self._file.seek(self._ends[place])
        return self._file.read(self._ends[place + 1] - self._ends[place])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        row: Row = json.loads(self._line(place).decode("utf-8", "surrogatepass"))
        return row

    def __iter__(self) -> Iterator[Row]:
        for place in range(len(self)):
            yield self[place]


ROWS_AT_ONCE = 4096


def in_parts(rows: Iterable[tuple[str, Row]], size: int | None = ROWS_AT_ONCE) -> Iterator[list[tuple[str, Row]]]:
    """Rows in lists of `size`, the last one shorter; None makes one list of all."""
    found: list[tuple[str, Row]] = []
    for row in rows:
        found.append(row)
        if len(found) == size:
            yield found
            found = []
    if found:
        yield found
