"""The largest changes of a model over all its tensors together: exactly so many, found in two or three passes over the files.

The first pass counts the upper halves of the bit patterns, the second the lower halves in the bin where the last one kept is. Where
several values equal it and not all are kept, a third counts them in every piece: those of the tensor whose name sorts first are taken
first, and in a tensor those in front.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.methods.sparse import num_kept
from ftcli.merging.numbers import Array
from ftcli.merging.selection import ALL, NONE, NUM_BINS, Largest, bin_of, exact_threshold, histogram, lower_halves

Run = Callable[[Callable[[Any], None], Iterable[Any]], Any]
"""Calls a function of every item, perhaps several at a time."""


@dataclass(frozen=True)
class TrimmedTensor:
    """A tensor that is trimmed together with others."""

    name: str
    labels: Sequence[str]
    """Of its models."""
    size: int
    magnitudes: Callable[[], Iterator[Sequence[Array]]]
    """Of each piece, what each model changes, without its sign."""


@dataclass
class _Sums:
    """Counts of each model, added up by several threads: whole numbers, in whatever order."""

    lock: Lock
    counts: dict[str, NDArray[np.int64]]

    def add(self, label: str, found: NDArray[np.int64]) -> None:
        with self.lock:
            self.counts[label] += found


def global_limits(tensors: Sequence[TrimmedTensor], densities: Mapping[str, float], run: Run) -> dict[tuple[str, str], Largest]:
    """For each tensor and model, by both their names, which of its changes are kept.

    Args:
        densities: of each model, the share of all its changes that is kept.
    """
    sizes = Counter[str]()
    for tensor in tensors:
        sizes.update(dict.fromkeys(tensor.labels, tensor.size))
    kept = {label: num_kept(densities[label], size) for label, size in sizes.items()}
    trimmed = {label: count for label, count in kept.items() if 0 < count < sizes[label]}
    found = {
        (tensor.name, label): NONE if kept[label] == 0 else ALL for tensor in tensors for label in tensor.labels if label not in trimmed
    }
    bins = {label: bin_of(total, trimmed[label]) for label, total in _upper_halves(tensors, trimmed, run).items()}
    thresholds = {}
    for label, (num_above, halves) in _lower_halves(tensors, bins, run).items():
        thresholds[label] = exact_threshold(bins[label], halves, trimmed[label] - num_above)
    partly = {label: (limit, wanted) for label, (limit, wanted, num_equal) in thresholds.items() if wanted < num_equal}
    whole = {label: Largest(limit, sys.maxsize, 0) for label, (limit, _, _) in thresholds.items()}
    found |= {(tensor.name, label): whole[label] for tensor in tensors for label in tensor.labels if label in whole}
    return found | (_ties(tensors, partly, run) if partly else {})


def _upper_halves(tensors: Sequence[TrimmedTensor], labels: Iterable[str], run: Run) -> dict[str, NDArray[np.int64]]:
    """``(NUM_BINS,)`` counts of each model's changes by the upper halves of their bit patterns."""
    sums = _Sums(Lock(), {label: np.zeros(NUM_BINS, np.int64) for label in labels})

    def count(tensor: TrimmedTensor) -> None:
        for piece in tensor.magnitudes() if sums.counts else ():
            for label, values in zip(tensor.labels, piece, strict=True):
                if label in sums.counts:
                    sums.add(label, histogram(values))

    run(count, tensors)
    return sums.counts


def _lower_halves(tensors: Sequence[TrimmedTensor], bins: Mapping[str, int], run: Run) -> dict[str, tuple[int, NDArray[np.int64]]]:
    """How many of each model's changes are above its bin, and ``(65536,)`` counts of those in it by the lower halves."""
    sums = _Sums(Lock(), {label: np.zeros(2**16 + 1, np.int64) for label in bins})

    def count(tensor: TrimmedTensor) -> None:
        for piece in tensor.magnitudes() if bins else ():
            for label, values in zip(tensor.labels, piece, strict=True):
                if label in bins:
                    halves = lower_halves(values, bins[label])
                    above = np.count_nonzero(np.ascontiguousarray(values).view(np.uint32) >= np.uint32((bins[label] + 1) << 16))
                    sums.add(label, np.append(np.bincount(halves, minlength=2**16), above))

    run(count, tensors)
    return {label: (int(found[-1]), found[:-1]) for label, found in sums.counts.items()}


def _ties(tensors: Sequence[TrimmedTensor], partly: Mapping[str, tuple[np.float32, int]], run: Run) -> dict[tuple[str, str], Largest]:
    """Where several changes equal a threshold and not all are kept: how many in which piece of which tensor."""
    equal: dict[tuple[str, str], list[int]] = {}

    def count(tensor: TrimmedTensor) -> None:
        for label in tensor.labels:
            equal[tensor.name, label] = []
        for piece in tensor.magnitudes():
            for label, values in zip(tensor.labels, piece, strict=True):
                if label in partly:
                    equal[tensor.name, label].append(int(np.count_nonzero(values == partly[label][0])))

    run(count, tensors)
    found = {}
    for label, (limit, wanted) in partly.items():
        for tensor in sorted((tensor for tensor in tensors if label in tensor.labels), key=lambda tensor: tensor.name):
            found[tensor.name, label], wanted = _share(equal[tensor.name, label], limit, wanted)
    return found


def _share(num_equal: Sequence[int], limit: np.float32, wanted: int) -> tuple[Largest, int]:
    """Which of one tensor's values are taken, and how many are wanted of the tensors behind it.

    Args:
        num_equal: in each piece, how many are equal to the limit.
    """
    for index, number in enumerate(num_equal):
        if number >= wanted:
            return Largest(limit, index, wanted), 0
        wanted -= number
    return Largest(limit, sys.maxsize, 0), wanted
