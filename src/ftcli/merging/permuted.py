"""A model's tensor over the tokens, with its rows in the order of the merged vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.layers import embedding_name
from ftcli.merging.methods.sums import weighted_sum
from ftcli.merging.numbers import Array
from ftcli.merging.planned import Input, Plan, TensorPlan
from ftcli.merging.readers import Reader, StoredReader, open_reader
from ftcli.merging.sources import Source
from ftcli.merging.stored import OpenFiles, StoredTensor
from ftcli.merging.vocabulary import Vocabulary

_BLOCK = 4096


def tensor_reader(plan: Plan, tensor: TensorPlan, item: Input, files: OpenFiles) -> Reader:
    """The reader of one input of a tensor, in the order of the merged vocabulary where its rows are tokens."""
    vocabulary = plan.vocabulary
    if not tensor.is_vocabulary or vocabulary is None or vocabulary.is_identity(item.source):
        return open_reader(plan.sources[item.source], item.name, files)
    peers = _peers(plan, vocabulary, tensor, item)
    readers = {index: open_reader(plan.sources[index], name, files, by_entry=True) for index, name in peers.items()}
    return _as_one_row(PermutedReader(vocabulary, item.source, readers), tensor)


def statistics_reader(plan: Plan, tensor: TensorPlan, item: Input, statistics: StoredTensor, files: OpenFiles) -> Reader:
    """The reader of what is known of an input's numbers, in the same order; of rows that are not the model's own it is 0."""
    vocabulary = plan.vocabulary
    if not tensor.is_vocabulary or vocabulary is None or vocabulary.is_identity(item.source):
        return StoredReader(statistics, files)
    own = {item.source: StoredReader(statistics, files, by_entry=True)}
    return _as_one_row(PermutedReader(vocabulary, item.source, own, is_filled=False), tensor)


def _as_one_row(reader: PermutedReader, tensor: TensorPlan) -> Reader:
    return reader if len(tensor.shape) > 1 else VectorReader(reader, tensor.size)


def _peers(plan: Plan, vocabulary: Vocabulary, tensor: TensorPlan, item: Input) -> dict[int, str]:
    """The same tensor of every model that has it, for the tokens that this one has not."""
    items = [*tensor.inputs, *([tensor.base] if tensor.base else [])]
    peers = {other.source: other.name for other in items} | {item.source: item.name}
    for source in vocabulary.providers:
        if source not in peers and (name := _same_kind(plan.sources[source], tensor)) is not None:
            peers[source] = name
    return peers


def _same_kind(source: Source, tensor: TensorPlan) -> str | None:
    """The tensor of that name; the embedding for a matrix over the tokens that has none, as a tied head."""
    if tensor.name in source.tensors:
        return tensor.name
    return embedding_name(source) if len(tensor.shape) > 1 else None


class PermutedReader:
    """A model's embedding or head with the rows of the merged vocabulary."""

    dtype = "F32"

    def __init__(self, vocabulary: Vocabulary, source: int, readers: Mapping[int, Reader], *, is_filled: bool = True) -> None:
        """
        Args:
            readers: of the source, and of those whose rows stand in for what it has not.
            is_filled: rows that it has not are others', or the mean of its own; else they are 0.
        """
        self._vocabulary, self._source, self._readers, self._is_filled = vocabulary, source, readers, is_filled
        self._mean: Array | None = None

    def rows(self, first: int, last: int) -> Array:
        vocabulary = self._vocabulary
        wanted = vocabulary.own[self._source][first:last].copy()
        replaced = [row - first for row in vocabulary.forced if first <= row < last]
        wanted[replaced] = -1
        found: Array | None = None
        for begin, end in _runs(wanted):
            row = int(wanted[begin])
            part = self._readers[self._source].rows(row, row + end - begin)
            if found is None:
                found = np.zeros((last - first, part.shape[1]), np.float32)
            found[begin:end] = part
        for position in np.flatnonzero(wanted < 0).tolist():
            part = self._substitute(first + position)
            if found is None:
                found = np.zeros((last - first, part.shape[-1]), np.float32)
            found[position] = part
        assert found is not None
        return found

    def stored(self, first: int, last: int) -> NDArray[Any] | None:
        return None

    def _substitute(self, row: int) -> Array:
        vocabulary = self._vocabulary
        if self._is_filled and (row >= vocabulary.padding or row in vocabulary.rowless):
            return self._average()
        places = [(source, place) for source, place in vocabulary.substitutes.get(row, ()) if source in self._readers]
        if not places or not self._is_filled:
            return np.zeros_like(self._readers[self._source].rows(0, 1)[0])
        found = [self._readers[source].rows(place, place + 1)[0] for source, place in places]
        return weighted_sum(found, (1 / len(found),) * len(found))

    def _average(self) -> Array:
        """The mean of this model's rows, in float64 and rounded."""
        if self._mean is None:
            own = self._vocabulary.own[self._source]
            used = np.unique(own[own >= 0])
            total = np.zeros(self._readers[self._source].rows(0, 1).shape[1])
            for begin, end in _runs(used):
                for start in range(begin, end, _BLOCK):
                    first, last = int(used[start]), int(used[min(end, start + _BLOCK) - 1]) + 1
                    total += self._readers[self._source].rows(first, last).sum(axis=0, dtype=np.float64)
            self._mean = np.asarray(total / len(used), np.float32)
        return self._mean


class VectorReader:
    """A vector over the tokens, as the bias of a head is: one row, its entries in the order of the merged vocabulary."""

    dtype = "F32"

    def __init__(self, entries: PermutedReader, size: int) -> None:
        """
        Args:
            entries: the vector with a row for each entry.
        """
        self._entries, self._size = entries, size

    def rows(self, first: int, last: int) -> Array:
        return self._entries.rows(0, self._size).reshape(1, -1)[first:last]

    def stored(self, first: int, last: int) -> NDArray[Any] | None:
        return None


def _runs(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Begin and end of each stretch of rows that follow each other; those below 0 are left out.

    Example:
        >>> _runs(np.array([3, 4, -1, 0, 7, 8]))
        [(0, 2), (3, 4), (4, 6)]
    """
    if len(rows) == 0:
        return []
    # -1 and 0 differ by 1, and do not follow each other
    breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return [(begin, end) for begin, end in pairwise(edges) if rows[begin] >= 0]
