"""The k largest of a tensor's values without sorting it: a histogram of float32 bit patterns, two passes, exact.

Bit patterns of non-negative floats are ordered like the floats. The first pass counts their upper halves (32,768 bins, those of
bfloat16); the second looks at the lower halves in the one bin where the k-th value is. Equal values are taken from the front.
Where a sample tells nearly where the k-th value is, one pass that counts what is above and keeps what is near is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece

Counts = tuple[NDArray[np.uint16], NDArray[np.uint32]]
"""Lower halves that are in a piece, and how often each is."""
NUM_BINS = 2**15
_SAMPLED_FROM, _SAMPLED_TO = 2**18, 2**26
"""Sizes of tensors that are worth a sample, and whose share near the threshold can be kept."""
_CROWDED = 0.25
"""Share of a tensor that is not kept: where so many values are near the threshold, most are equal, as in layers that were not trained."""
_MARGIN = 0.04
"""Share of the values on each side of the sample's threshold among which the tensor's is looked for."""


@dataclass(frozen=True, slots=True)
class Largest:
    """Tells of a piece's values which are among the k largest of the tensor."""

    threshold: np.float32
    """The k-th largest value."""
    last_piece: int
    """In pieces before this one all values equal to the threshold are taken, behind it none."""
    num_in_last: int
    """So many of them are taken in that piece, from its front."""

    def mask(self, values: Array, piece: int) -> NDArray[np.bool_]:
        """True where a value is among the k largest.

        Args:
            values: ``(rows, columns)``, not negative.
            piece: its index.
        """
        if piece < self.last_piece:
            return values >= self.threshold
        mask = values > self.threshold
        if piece == self.last_piece:
            ties = np.flatnonzero(values == self.threshold)[: self.num_in_last]
            mask.reshape(-1)[ties] = True
        return mask


NONE = Largest(np.float32(np.inf), -1, 0)
ALL = Largest(np.float32(-1), 0, 0)


def histogram(values: Array) -> NDArray[np.int64]:
    """``(NUM_BINS,)`` counts of values by the upper half of their bit pattern.

    Args:
        values: any shape, not negative.
    """
    bits = np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)
    return np.bincount(bits.reshape(-1), minlength=NUM_BINS)


Values = Callable[[Piece], Array]
"""``(rows, columns)`` of a piece, not negative."""


def largest(inputs: Inputs, wanted: Sequence[tuple[Values, Sequence[int]]]) -> list[list[Largest]]:
    """Which values of the tensor are its k largest, for several kinds of values, and several k of each.

    Args:
        wanted: a kind of values, and how many of them to take: 0 to all.
    """
    rows, columns = inputs.shape
    size = rows * columns
    if _SAMPLED_FROM <= size <= _SAMPLED_TO and (found := _by_sample(inputs, wanted)) is not None:
        return found
    is_needed = [any(0 < count < size for count in counts) for _, counts in wanted]
    totals = [np.zeros(NUM_BINS, np.int64) for _ in wanted]
    for piece in inputs.pieces() if any(is_needed) else ():
        for (values, _), total, needed in zip(wanted, totals, is_needed, strict=True):
            if needed:
                total += histogram(values(piece))
    bins = [{k: bin_of(total, k) for k in counts if 0 < k < size} for (_, counts), total in zip(wanted, totals, strict=True)]
    halves: list[dict[int, list[Counts]]] = [{bin_index: [] for bin_index in own.values()} for own in bins]
    for piece in inputs.pieces() if any(is_needed) else ():
        for (values, _), parts in zip(wanted, halves, strict=True):
            if parts:
                _add_lower_halves(values(piece), parts)
    found = []
    for (_, counts), total, own, parts in zip(wanted, totals, bins, halves, strict=True):
        exact = {0: NONE, size: ALL}
        for k, bin_index in own.items():
            exact[k] = _within(bin_index, parts[bin_index], k - int(total[bin_index + 1 :].sum()))
        found.append([exact[k] for k in counts])
    return found


@dataclass
class _Bracket:
    """Where the k-th largest value should be, and what has been seen of it."""

    k: int
    low: np.float32
    high: np.float32
    limit: int
    """Most values to keep."""
    num_above: int = 0
    num_within: int = 0
    within: list[Array] = field(default_factory=list)
    """Of each piece, the values from `low` to `high`; nothing when they are too many."""

    @classmethod
    def of(cls, sample: Array, k: int, size: int) -> _Bracket:
        """
        Args:
            sample: ``(n,)`` in ascending order.
        """
        place, margin = (1 - k / size) * sample.size, _MARGIN * sample.size
        first, last = int(place - margin), int(place + margin) + 1
        low = sample[first] if first > 0 else np.float32(0)
        high = sample[last] if last < sample.size else np.float32(np.inf)
        return cls(k, low, high, int(_CROWDED * size))

    def add(self, values: Array) -> None:
        """The values of the next piece, ``(n,)``."""
        if self.num_within > self.limit:
            return
        is_above = values > self.high
        self.num_above += int(np.count_nonzero(is_above))
        is_within = values >= self.low
        is_within ^= is_above  # what is above is not below
        self.within.append(values[np.flatnonzero(is_within)])
        self.num_within += self.within[-1].size
        if self.num_within > self.limit:
            self.within.clear()

    def largest(self) -> Largest | None:
        """None when the value is elsewhere."""
        if self.num_within > self.limit:
            return None
        wanted = self.k - self.num_above
        together = np.concatenate(self.within)
        if not 1 <= wanted <= together.size:
            return None
        threshold = np.partition(together, together.size - wanted)[together.size - wanted]
        wanted -= int(np.count_nonzero(together > threshold))
        return _last_of([int(np.count_nonzero(part == threshold)) for part in self.within], wanted, threshold)


def _by_sample(inputs: Inputs, wanted: Sequence[tuple[Values, Sequence[int]]]) -> list[list[Largest]] | None:
    """As `largest`, in one pass: evenly spaced rows tell nearly where each threshold is; None when they do not."""
    rows, columns = inputs.shape
    size = rows * columns
    sample = inputs.sample()
    if sample is None:
        return None
    brackets: list[dict[int, _Bracket]] = []
    for values, counts in wanted:
        inner = [k for k in counts if 0 < k < size]
        ordered = np.sort(values(sample).reshape(-1)) if inner else np.zeros(0, np.float32)
        brackets.append({k: _Bracket.of(ordered, k, size) for k in inner})
    for piece in inputs.pieces() if any(brackets) else ():
        for (values, _), own in zip(wanted, brackets, strict=True):
            if own:
                flat = values(piece).reshape(-1)
                for bracket in own.values():
                    bracket.add(flat)
    found = []
    for (_, counts), own in zip(wanted, brackets, strict=True):
        exact = {0: NONE, size: ALL} | {k: bracket.largest() for k, bracket in own.items()}
        found.append([exact[k] for k in counts])
    complete = [[one for one in row if one is not None] for row in found]
    return complete if [len(row) for row in complete] == [len(row) for row in found] else None


def _last_of(num_equal: Sequence[int], wanted: int, threshold: np.float32) -> Largest:
    """The threshold, and where the last one equal to it that is taken is.

    Args:
        num_equal: in each piece, how many are equal to it.
        wanted: how many of these are taken, at least one.
    """
    for index, number in enumerate(num_equal):
        if number >= wanted:
            return Largest(threshold, index, wanted)
        wanted -= number
    raise AssertionError("there are fewer values than were counted")


def bin_of(total: NDArray[np.int64], k: int) -> int:
    """The bin in which the k-th largest value is."""
    return NUM_BINS - 1 - int(np.searchsorted(np.cumsum(total[::-1]), k))


def _add_lower_halves(values: Array, parts: dict[int, list[Counts]]) -> None:
    """Append how often each lower half of a bit pattern is in each of the bins."""
    for bin_index, found in parts.items():
        counts = np.bincount(lower_halves(values, bin_index), minlength=1)
        present = np.flatnonzero(counts)
        found.append((present.astype(np.uint16), counts[present].astype(np.uint32)))


def lower_halves(values: Array, bin_index: int) -> NDArray[np.uint16]:
    """``(n,)`` lower halves of the bit patterns of the values in one bin, in order."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    # what is below the bin wraps around to the top
    places = np.flatnonzero(bits - np.uint32(bin_index << 16) < np.uint32(2**16))
    return bits[places].astype(np.uint16)


def _within(bin_index: int, parts: list[Counts], count: int) -> Largest:
    """The `count` largest, at least one, among those of one bin."""
    total = np.zeros(2**16, np.int64)
    for present, counts in parts:
        total[present] += counts
    threshold, wanted, _ = exact_threshold(bin_index, total, count)
    low = int(threshold.view(np.uint32)) & 0xFFFF
    return _last_of([int(counts[present == low].sum()) for present, counts in parts], wanted, threshold)


def exact_threshold(bin_index: int, counts: NDArray[np.int64], count: int) -> tuple[np.float32, int, int]:
    """The `count`-th largest value of a bin, how many of those equal to it are among the `count`, and how many there are.

    Args:
        counts: ``(65536,)`` values of the bin by the lower halves of their bit patterns.
        count: at least one, at most all of them.
    """
    from_above = np.cumsum(counts[::-1])
    position = int(np.searchsorted(from_above, count))
    low = 2**16 - 1 - position
    num_equal = int(counts[low])
    wanted = count - int(from_above[position] - num_equal)
    threshold: np.float32 = np.array([bin_index << 16 | low], np.uint32).view(np.float32)[0]
    return threshold, wanted, num_equal
