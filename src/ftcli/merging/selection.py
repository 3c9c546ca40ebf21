"""The k largest of a tensor's values without sorting it: a histogram of float32 bit patterns, two passes, exact.

Bit patterns of non-negative floats are ordered like the floats. The first pass counts their upper halves (32,768 bins, those of
bfloat16); the second looks at the lower halves in the one bin where the k-th value is. Equal values are taken from the front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece

NUM_BINS = 2**15


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


_NONE = Largest(np.float32(np.inf), -1, 0)
_ALL = Largest(np.float32(-1), 0, 0)


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
    is_needed = [any(0 < count < size for count in counts) for _, counts in wanted]
    totals = [np.zeros(NUM_BINS, np.int64) for _ in wanted]
    for piece in inputs.pieces() if any(is_needed) else ():
        for (values, _), total, needed in zip(wanted, totals, is_needed, strict=True):
            if needed:
                total += histogram(values(piece))
    bins = [{k: _bin_of(total, k) for k in counts if 0 < k < size} for (_, counts), total in zip(wanted, totals, strict=True)]
    halves: list[dict[int, list[NDArray[np.uint16]]]] = [{bin_index: [] for bin_index in own.values()} for own in bins]
    for piece in inputs.pieces() if any(is_needed) else ():
        for (values, _), parts in zip(wanted, halves, strict=True):
            if parts:
                _add_lower_halves(values(piece), parts)
    found = []
    for (_, counts), total, own, parts in zip(wanted, totals, bins, halves, strict=True):
        exact = {0: _NONE, size: _ALL}
        for k, bin_index in own.items():
            exact[k] = _within(bin_index, parts[bin_index], k - int(total[bin_index + 1 :].sum()))
        found.append([exact[k] for k in counts])
    return found


def _bin_of(total: NDArray[np.int64], k: int) -> int:
    """The bin in which the k-th largest value is."""
    return NUM_BINS - 1 - int(np.searchsorted(np.cumsum(total[::-1]), k))


def _add_lower_halves(values: Array, parts: dict[int, list[NDArray[np.uint16]]]) -> None:
    """Append the lower halves of the bit patterns in each of the bins, in order."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    for bin_index, found in parts.items():
        # what is below the bin wraps around to the top
        places = np.flatnonzero(bits - np.uint32(bin_index << 16) < np.uint32(2**16))
        found.append(bits[places].astype(np.uint16))


def _within(bin_index: int, parts: list[NDArray[np.uint16]], count: int) -> Largest:
    """The `count` largest, at least one, among those of one bin."""
    total = np.zeros(2**16, np.int64)
    for part in parts:
        total += np.bincount(part, minlength=2**16)
    from_above = np.cumsum(total[::-1])
    position = int(np.searchsorted(from_above, count))
    low = 2**16 - 1 - position
    wanted = count - int(from_above[position] - total[low])
    threshold = np.array([bin_index << 16 | low], np.uint32).view(np.float32)[0]
    for index, part in enumerate(parts):
        num_equal = int(np.count_nonzero(part == low))
        if num_equal >= wanted:
            return Largest(threshold, index, wanted)
        wanted -= num_equal
    raise AssertionError("the bin holds fewer values than were counted")


def threshold_of(counts: NDArray[np.int64], num_kept: int) -> float:
    """The lower edge of the histogram bin in which the `num_kept`-th largest value is: what is not below it is kept."""
    from_above = np.cumsum(counts[::-1])
    bin_index = NUM_BINS - 1 - int(np.searchsorted(from_above, max(1, num_kept)))
    return float(np.array([max(0, bin_index) << 16], np.uint32).view(np.float32)[0])
