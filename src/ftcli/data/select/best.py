"""The best rows of a stream, its spread, and a fair sample of it: each in memory that does not grow with the stream.

None of them depends on the order of the stream: rows are told apart by digests of their texts, and equal texts count once.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_SPREAD = 1 << 17
SPARE_ROWS = 100
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that may be chosen."""

    key: float
    """What rows are ranked by: the score, with the noise of a draw where the way draws."""
    digest: int
    index: int
    """Of the row in the pool."""
    source: int
    score: float
    group: int

    @property
    def rank(self) -> tuple[float, int]:
        """Equal keys are ranked by digest, as unique as it gets."""
        return self.key, self.digest


@dataclass
class _Heap:
    """The best so many candidates, one of each text."""

    capacity: int
    entries: list[tuple[tuple[float, int], Candidate]] = field(default_factory=list)
    copies: dict[int, int] = field(default_factory=dict)
    """How often each text in it came again. Who was pushed out had a lower key than all that stay, and so have its copies."""

    def worst_key(self) -> float:
        if not self.capacity:
            return np.inf
        return self.entries[0][1].key if len(self.entries) == self.capacity else -np.inf

    def ranked(self) -> list[Candidate]:
        """Best first."""
        return [candidate for _, candidate in sorted(self.entries, key=lambda entry: entry[0], reverse=True)]

    def offer(self, candidate: Candidate) -> None:
        if candidate.digest in self.copies:
            self.copies[candidate.digest] += 1
            return
        if len(self.entries) < self.capacity:
            heapq.heappush(self.entries, (candidate.rank, candidate))
        elif self.capacity and candidate.rank > self.entries[0][0]:
            _, out = heapq.heapreplace(self.entries, (candidate.rank, candidate))
            del self.copies[out.digest]
        else:
            return
        self.copies[candidate.digest] = 0


class Best:
    """The best rows of each group up to its quota, and then the best of what is left up to `count`."""

    def __init__(self, count: int, quotas: Sequence[int], *, has_spare: bool = False) -> None:
        """
        Args:
            has_spare: keep about as many rows again, to take the places of those that `chosen` is told to leave out.
        """
        self.count = count
        self.quotas = list(quotas) if len(quotas) > 1 else []
        self._groups = [_Heap(_with_spare(quota) if has_spare else quota) for quota in self.quotas]
        self._all = _Heap(_with_spare(count) if has_spare else count)

    def offer(
        self,
        keys: NDArray[np.float64],
        scores: NDArray[np.float64],
        groups: NDArray[np.int64],
        digests: NDArray[np.uint64],
        indices: NDArray[np.int64],
        source: int,
    ) -> None:
        """Rows of a chunk, (n,) each."""
        worst = self._all.worst_key()
        bars = np.array([min(worst, heap.worst_key()) for heap in self._groups] or [worst])
        for place in np.flatnonzero(keys >= bars[groups if self._groups else np.zeros(len(keys), dtype=np.int64)]).tolist():
            candidate = Candidate(
                float(keys[place]), int(digests[place]), int(indices[place]), source, float(scores[place]), int(groups[place])
            )
            self._all.offer(candidate)
            if self._groups:
                self._groups[candidate.group].offer(candidate)

    def candidates(self) -> list[Candidate]:
        """All that may still be chosen, best first."""
        found = {candidate.digest: candidate for heap in (*self._groups, self._all) for _, candidate in heap.entries}
        return sorted(found.values(), key=lambda candidate: candidate.rank, reverse=True)

    def chosen(self, without: Collection[int] = ()) -> tuple[list[Candidate], int]:
        """(the chosen rows, best first; how often their texts came again).

        Args:
            without: digests of candidates that are left out.
        """
        taken: dict[int, tuple[Candidate, _Heap]] = {}
        for heap, quota in zip(self._groups, self.quotas, strict=True):
            own = [candidate for candidate in heap.ranked() if candidate.digest not in without]
            taken |= {candidate.digest: (candidate, heap) for candidate in own[:quota]}
        for candidate in self._all.ranked():
            if len(taken) >= self.count:
                break
            if candidate.digest not in without:
                taken.setdefault(candidate.digest, (candidate, self._all))
        rows = sorted((candidate for candidate, _ in taken.values()), key=lambda candidate: candidate.rank, reverse=True)
        return rows, sum(heap.copies[digest] for digest, (_, heap) in taken.items())


def _with_spare(count: int) -> int:
    return 2 * count + SPARE_ROWS if count else 0


class Spread:
    """Quantiles of a stream of numbers: exact up to `MAX_SPREAD`, then of a sample that digests choose."""

    def __init__(self) -> None:
        self.count = 0
        self._values: list[NDArray[np.float64]] = []
        self._digests: list[NDArray[np.uint64]] = []
        self._shift = 0

    def add(self, values: NDArray[np.float64], digests: NDArray[np.uint64]) -> None:
        self.count += len(values)
        kept = (digests & np.uint64((1 << self._shift) - 1)) == 0
        self._values.append(values[kept])
        self._digests.append(digests[kept])
        while sum(map(len, self._values)) > MAX_SPREAD:
            self._shift += 1
            all_values, all_digests = np.concatenate(self._values), np.concatenate(self._digests)
            kept = (all_digests & np.uint64((1 << self._shift) - 1)) == 0
            self._values, self._digests = [all_values[kept]], [all_digests[kept]]

    def quantiles(self) -> dict[str, float]:
        """Value below which each share of the stream lies; empty where there is none."""
        values = np.concatenate(self._values) if self._values else np.zeros(0)
        if not len(values):
            return {}
        found = np.quantile(values, QUANTILES)
        return {f"{share:.0%}": float(value) for share, value in zip(QUANTILES, found, strict=True)}


class Sample:
    """Texts of a stream, each with the same odds whatever its place, and each once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._heap: list[tuple[float, int, str]] = []
        self._known: set[int] = set()

    def add(self, odds: NDArray[np.float64], digests: NDArray[np.uint64], texts: Sequence[str], max_chars: int) -> None:
        """The texts with the smallest (n,) `odds` are kept, `max_chars` of each."""
        bar = -self._heap[0][0] if len(self._heap) == self.size else np.inf
        for place in np.flatnonzero(odds < bar).tolist():
            digest = int(digests[place])
            if digest in self._known or not texts[place].strip():
                continue
            entry = (-float(odds[place]), digest, texts[place][:max_chars])
            if len(self._heap) < self.size:
                heapq.heappush(self._heap, entry)
            elif entry > self._heap[0]:
                self._known.discard(heapq.heapreplace(self._heap, entry)[1])
            else:
                continue
            self._known.add(digest)

    def texts(self) -> list[str]:
        return [text for _, _, text in sorted(self._heap, reverse=True)]
