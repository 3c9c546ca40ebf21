"""What a way of choosing text answers, and what several ways need of the pool before they can score it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ftcli.data.select.best import Sample
from ftcli.data.select.words import digests_of, uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ftcli.data.select.pool import Pool

Tell = Callable[[int, str], None]
"""Is told how many rows of the pool have been read, and what for."""
_SAMPLE_STREAM, _RANDOM_STREAM = 1, 2


class Way(Protocol):
    """Scores rows by how much they are like the task set; a higher score is better."""

    unit: str
    """What a score is, in a few words."""

    def fit(self, gold: Sequence[str], pool: Pool, tell: Tell) -> None:
        """Learn from the task set, and from one reading of the pool."""
        ...

    def score(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """((n,) score, (n,) group) of rows of the pool."""
        ...

    def noise(self, digests: NDArray[np.uint64]) -> NDArray[np.float64]:
        """(n,) what is added to the scores before rows are ranked; equal texts get the same."""
        ...

    def quotas(self, count: int) -> list[int]:
        """Rows that each group may choose first; one number where there are no groups."""
        ...

    def facts(self) -> dict[str, Any]:
        """What was decided on the way, for the report."""
        ...


class Random:
    """No way at all: the floor that others are measured against."""

    unit = "a number drawn for the text, 0 to 1"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, gold: Sequence[str], pool: Pool, tell: Tell) -> None:
        """Nothing to learn."""

    def score(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        return uniform(digests_of(texts), self.seed, _RANDOM_STREAM), np.zeros(len(texts), dtype=np.int64)

    def noise(self, digests: NDArray[np.uint64]) -> NDArray[np.float64]:
        return np.zeros(len(digests))

    def quotas(self, count: int) -> list[int]:
        return [count]

    def facts(self) -> dict[str, Any]:
        return {}


def sample_of(pool: Pool, size: int, seed: int, max_chars: int, tell: Tell) -> list[str]:
    """`size` different texts of the pool, drawn with `seed`, cut at `max_chars`."""
    sample = Sample(size)
    for chunk in pool.chunks():
        digests = digests_of(chunk.texts)
        sample.add(uniform(digests, seed, _SAMPLE_STREAM), digests, chunk.texts, max_chars)
        tell(chunk.first + len(chunk), "read the pool")
    return sample.texts()
