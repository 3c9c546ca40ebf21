"""Evaluation rows that stand in other texts: as a whole, or with most of their n-grams of words.

The texts are read a chunk at a time; kept are digests of the evaluation rows alone. What counts as a quotation is what
`ftcli data audit` counts, of words without case and punctuation. Source of 13-grams: Brown et al. 2020, arXiv:2005.14165, appendix C.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ftcli.data.leakage import MAX_WORDS, MIN_WORDS, words_of
from ftcli.data.select.words import WordReader, Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_QUOTED = 0.8


class HeldOut:
    """Evaluation rows, to be looked for in texts."""

    def __init__(self, texts: Sequence[str], *, ngram: int = MAX_WORDS, min_quoted: float = MIN_QUOTED) -> None:
        """
        Args:
            ngram: words in an n-gram; a shorter row is looked for with as many as it has, and below `MIN_WORDS` as a whole text.
            min_quoted: share of a row's n-grams that must stand in one text.
        """
        self.min_quoted = min_quoted
        self._reader = WordReader(words_of)
        words = self._reader.read(texts)
        lengths = np.diff(words.ends, prepend=0)
        self.num_rows = len(texts)
        self._whole = {digest: row for row, digest in enumerate(_whole(words)) if 0 < lengths[row] < MIN_WORDS}
        sizes = np.minimum(ngram, lengths)
        self._grams: dict[int, dict[int, list[int]]] = {}
        self._totals = np.zeros(len(texts), dtype=np.int64)
        rows = words.rows()
        for size in sorted(set(sizes[sizes >= MIN_WORDS].tolist())):
            grams, inside = words.ngrams(size)
            mine = inside & (sizes[rows] == size)
            found = self._grams.setdefault(size, {})
            for gram, row in sorted(set(zip(grams[mine].tolist(), rows[mine].tolist(), strict=True))):
                found.setdefault(gram, []).append(row)
                self._totals[row] += 1
        self._sorted = {size: np.array(sorted(grams), dtype=np.uint64) for size, grams in self._grams.items()}

    def find(self, texts: Sequence[str]) -> list[list[int]]:
        """For each text the evaluation rows that stand in it."""
        words = self._reader.read(texts)
        counts: list[Counter[int]] = [Counter() for _ in texts]
        rows = words.rows()
        for size, wanted in self._sorted.items():
            grams, inside = words.ngrams(size)
            hits = np.flatnonzero(inside & np.isin(grams, wanted))
            for row, gram in set(zip(rows[hits].tolist(), grams[hits].tolist(), strict=True)):
                counts[row].update(self._grams[size][gram])
        found = [[row for row, count in sorted(counter.items()) if count >= self.min_quoted * self._totals[row]] for counter in counts]
        if self._whole:
            for place, digest in enumerate(_whole(words)):
                if digest in self._whole:
                    found[place].append(self._whole[digest])
        return found

    def held_by(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """(n,) whether an evaluation row stands in each text."""
        return np.fromiter((bool(rows) for rows in self.find(texts)), dtype=bool, count=len(texts))


def _whole(words: Words) -> list[int]:
    """A digest of all words of each text, in their order."""
    starts = [0, *words.ends[:-1].tolist()]
    return [hash(words.ids[start:end].tobytes()) for start, end in zip(starts, words.ends.tolist(), strict=True)]
