"""Importance resampling on hashed n-grams (DSIR): rows whose n-grams the task set has more of than the pool.

Source: Xie et al. 2023, arXiv:2302.03169, section 3: words and pairs of words hashed into 10,000 buckets, the weight of a row the
ratio of its probabilities under two bags of n-grams, Gumbel noise on its logarithm. Here the task set's bag is smoothed towards the
pool's, by as much as leave-one-out says: with a small task set most buckets are empty, and a row is not to be lost for one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcli.data.select.words import WordReader, Words, best_strength, uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ftcli.data.select.pool import Pool
    from ftcli.data.select.way import Tell

NUM_BUCKETS = 10_000
SIZES = (1, 2)
_GUMBEL_STREAM = 3


class Bag:
    """How often n-grams fall into each bucket."""

    def __init__(self) -> None:
        self.counts = np.zeros(NUM_BUCKETS)
        self._reader = WordReader()

    def add(self, texts: Sequence[str]) -> Words:
        """Count the n-grams of `texts`; their words, for whoever needs them too."""
        words = self._reader.read(texts)
        for size in SIZES:
            buckets, inside = buckets_of(words, size)
            self.counts += np.bincount(buckets[inside], minlength=NUM_BUCKETS)
        return words


def buckets_of(words: Words, size: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """((W,) bucket of the n-gram that ends at each word, (W,) whether it lies in one text)."""
    grams, inside = words.ngrams(size)
    return (grams % np.uint64(NUM_BUCKETS)).astype(np.int64), inside


def kl(target: NDArray[np.float64], raw: NDArray[np.float64], chosen: NDArray[np.float64] | None = None) -> float:
    """Nats from the n-grams of `target` to those of the pool, or of what was chosen from it.

    Args:
        target, raw, chosen: (NUM_BUCKETS,) counts. Those of the chosen rows are smoothed towards the pool's: few rows leave most buckets
            empty, and would be far from everything.
    """
    p, q = target / max(1.0, target.sum()), shares_of(raw)
    if chosen is not None:
        q = smoothed_towards(q, chosen)[0]
    has = p > 0
    return float(np.sum(p[has] * np.log(p[has] / q[has])))


def shares_of(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the pool's n-grams, which sum to 1; a bucket that no row falls into is not 0, since the task set may have it."""
    counts = np.maximum(raw, 0.5)
    shares: NDArray[np.float64] = counts / counts.sum()
    return shares


def smoothed_towards(shares: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """(shares of n-grams by their counts and those of the pool, how many n-grams the pool counts for)."""
    strength = best_strength(counts, float(counts.sum()), shares)
    return (counts + strength * shares) / (counts.sum() + strength), strength


class Importance:
    """`--by ngrams`."""

    unit = "log of the odds that the task set gives the row's n-grams against the pool, nats"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._reader = WordReader()
        self._log_ratio = np.zeros(NUM_BUCKETS)
        self._strength = 0.0

    def fit(self, gold: Sequence[str], pool: Pool, tell: Tell) -> None:
        """Two bags: of the task set, and of the whole pool."""
        target, raw = Bag(), Bag()
        target.add(gold)
        for chunk in pool.chunks():
            raw.add(chunk.texts)
            tell(chunk.first + len(chunk), "count n-grams")
        self.learn(target.counts, raw.counts)

    def learn(self, target: NDArray[np.float64], raw: NDArray[np.float64]) -> None:
        """From (NUM_BUCKETS,) counts of both."""
        # the rows are the pool's, so that none of their n-grams is in an empty bucket: no share is set aside for those
        q = np.maximum(raw, 0.5) / max(1.0, raw.sum())
        p, self._strength = smoothed_towards(q, target)
        self._log_ratio = np.log(p / q)

    def score(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        words = self._reader.read(texts)
        total = np.zeros(len(texts))
        for size in SIZES:
            buckets, inside = buckets_of(words, size)
            total += words.sums(np.where(inside, self._log_ratio[buckets], 0.0))
        return total, np.zeros(len(texts), dtype=np.int64)

    def noise(self, digests: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Gumbel noise: the best sums are a draw without replacement by weight."""
        return -np.log(-np.log(uniform(digests, self.seed, _GUMBEL_STREAM)))

    def quotas(self, count: int) -> list[int]:
        return [count]

    def facts(self) -> dict[str, Any]:
        return {"buckets": NUM_BUCKETS, "pool_counts_as_ngrams": self._strength}
