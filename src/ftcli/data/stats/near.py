"""Rows that repeat an earlier one, among many: equal texts, equal words, and nearly equal ones by MinHash.

Kept of a row are two digests and its minima, some 400 bytes. The share of equal minima estimates the share of common character
n-grams with a deviation of at most 0.05. Sources: Broder 1997; Leskovec, Rajaraman & Ullman, "Mining of massive datasets", section 3.4.
Legend: ``N`` rows, ``P`` permutations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftcli.data.leakage import NUM_PERMUTATIONS, ROWS_PER_BAND, Text, character_ngrams, minima, mixed

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_CHARS = 4000
"""Of a text that are compared: more would cost time in proportion, and two texts that begin alike are told by these."""


@dataclass(frozen=True)
class Repeats:
    """Rows that repeat an earlier one, each under the first kind that fits."""

    exact: int
    same_words: int
    near: int | None
    """None where it was not looked for."""


class RepeatFinder:
    """Collects rows, and says at the end how many repeat an earlier one."""

    def __init__(self, *, finds_near: bool = True, min_near: float = 0.6) -> None:
        """
        Args:
            min_near: share of common character n-grams from which rows are nearly equal.
        """
        self.finds_near = finds_near
        self.min_near = min_near
        self._texts: list[NDArray[np.uint64]] = []
        self._words: list[NDArray[np.uint64]] = []
        self._minima: list[NDArray[np.uint32]] = []

    def add(self, texts: Sequence[str]) -> None:
        """Rows in their order."""
        read = [Text("", text, "") for text in texts]
        self._texts.append(_digests(texts))
        self._words.append(_digests([" ".join(text.words) for text in read]))
        if self.finds_near:
            self._minima.append(minima_of(texts))

    def found(self) -> Repeats:
        """What repeats."""
        texts, words = (np.concatenate([np.zeros(0, dtype=np.uint64), *parts]) for parts in (self._texts, self._words))
        again = _is_again(texts)
        same_words = _is_again(words) & ~again
        near: int | None = None
        if self.finds_near:
            table = np.concatenate([np.zeros((0, NUM_PERMUTATIONS), dtype=np.uint32), *self._minima])
            near = int(np.count_nonzero(near_an_earlier(table, self.min_near) & ~again & ~same_words))
        return Repeats(int(again.sum()), int(same_words.sum()), near)


def minima_of(texts: Sequence[str]) -> NDArray[np.uint32]:
    """(n, P) minima of each text's character n-grams; zeros for a text without."""
    rows = np.zeros((len(texts), NUM_PERMUTATIONS), dtype=np.uint32)
    for place, text in enumerate(texts):
        grams = character_ngrams(Text("", text[:MAX_CHARS], ""))
        if len(grams):
            rows[place] = minima(grams) >> np.uint64(32)
    return rows


def near_an_earlier(table: NDArray[np.uint32], min_near: float) -> NDArray[np.bool_]:
    """(N,) whether a row shares enough of its (N, P) minima with an earlier one. Rows without n-grams have zeros, and are near none."""
    has_grams: NDArray[np.bool_] = np.any(table != 0, axis=1)
    near = np.zeros(len(table), dtype=bool)
    for start in range(0, NUM_PERMUTATIONS, ROWS_PER_BAND):
        keys = np.zeros(len(table), dtype=np.uint64)
        for column in range(start, start + ROWS_PER_BAND):
            keys = mixed(keys ^ table[:, column].astype(np.uint64))
        # in a bucket, rows stand in their own order; each is compared with the first and with the one before it
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        same = ranked[1:] == ranked[:-1]
        firsts = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(order)), 0))
        places = np.flatnonzero(same) + 1
        for others in (order[places - 1], order[firsts[places]]):
            later = order[places]
            asked = ~near[later] & has_grams[later]
            later, earlier = later[asked], others[asked]
            for part in np.array_split(np.arange(len(later)), len(later) // 50_000 + 1):
                shares = (table[later[part]] == table[earlier[part]]).mean(axis=1)
                near[later[part][shares >= min_near]] = True
    return near


def _digests(texts: Sequence[str]) -> NDArray[np.uint64]:
    """(n,) 0 for a text without content."""
    values = (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") if text.strip() else 0
        for text in texts
    )
    return np.fromiter(values, dtype=np.uint64, count=len(texts))


def _is_again(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(N,) whether an earlier row has the same digest, and content."""
    _, first = np.unique(digests, return_index=True)
    again = np.ones(len(digests), dtype=bool)
    again[first] = False
    again[digests == 0] = False
    return again
