"""The rows of one input of one tensor, as the merge sees them: adapter applied, tokens in the order of the merged vocabulary."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.adapters import LowRankChange
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import rows_and_columns
from ftcli.merging.sources import Source
from ftcli.merging.stored import OpenFiles, StoredTensor


class Reader(Protocol):
    """Rows of one tensor of one model."""

    def rows(self, first: int, last: int) -> Array:
        """``(last - first, columns)`` float32."""

    def stored(self, first: int, last: int) -> NDArray[Any] | None:
        """The same rows as they are stored, None where they are computed."""

    @property
    def dtype(self) -> str:
        """What they are stored as."""


class StoredReader:
    """Rows as they are in the file."""

    def __init__(self, tensor: StoredTensor, files: OpenFiles, *, by_entry: bool = False) -> None:
        """
        Args:
            by_entry: every entry of a vector is a row of its own, and not the vector one row.
        """
        self._tensor, self._files = tensor, files
        self._columns = 1 if by_entry and len(tensor.shape) == 1 else rows_and_columns(tensor.shape)[1]

    @property
    def dtype(self) -> str:
        return self._tensor.dtype

    def rows(self, first: int, last: int) -> Array:
        return self._files.numbers(self._tensor, *self._elements(first, last)).reshape(last - first, self._columns)

    def stored(self, first: int, last: int) -> NDArray[Any] | None:
        return self._files.stored(self._tensor, *self._elements(first, last)).reshape(last - first, self._columns)

    def _elements(self, first: int, last: int) -> tuple[int, int]:
        """Where the rows begin, and how many elements they have."""
        # what is behind the tensor in its file is another one
        assert 0 <= first <= last, f"rows {first} to {last} of `{self._tensor.name}`"
        assert last * self._columns <= self._tensor.size, f"rows {first} to {last} of `{self._tensor.name}`, {self._tensor.shape}"
        return first * self._columns, (last - first) * self._columns


class AdaptedReader:
    """Rows with a low-rank change added."""

    dtype = "F32"

    def __init__(self, inner: StoredReader, change: LowRankChange) -> None:
        self._inner, self._change = inner, change

    def rows(self, first: int, last: int) -> Array:
        return self._change.rows(self._inner.rows(first, last), first)

    def stored(self, first: int, last: int) -> NDArray[Any] | None:
        return None


def open_reader(source: Source, name: str, files: OpenFiles, *, by_entry: bool = False) -> Reader:
    """The reader of a source's tensor, without regard to its vocabulary.

    Args:
        by_entry: every entry of a vector is a row of its own.
    """
    tensor = source.tensor(name)
    inner = StoredReader(tensor, files, by_entry=by_entry)
    if source.adapter is None or name not in source.adapter.low_rank:
        return inner
    change = LowRankChange(source.adapter.low_rank[name], files)
    change.measure(tensor, files)
    return AdaptedReader(inner, change)


def are_equal(readers: list[Reader], first: int, last: int) -> bool:
    """True when all have the same bits in these rows, as they are stored."""
    if len({reader.dtype for reader in readers}) != 1:
        return False
    # one row tells most tensors apart
    return all(_equal_rows(readers, begin, end) for begin, end in ((first, first + 1), (first, last)))


def _equal_rows(readers: list[Reader], first: int, last: int) -> bool:
    lead = readers[0].stored(first, last)
    others = [reader.stored(first, last) for reader in readers[1:]]
    return lead is not None and all(other is not None and np.array_equal(lead, other) for other in others)
