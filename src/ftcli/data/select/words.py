"""Words of many texts as 64-bit numbers, and the n-grams they form, without a Python loop over n-grams.

Legend: ``N`` texts, ``W`` words of all of them, one text after the other.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ftcli.data.leakage import mixed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Digests = NDArray[np.uint64]
    Counts = NDArray[np.float64]

_MAX_KEPT_WORDS = 300_000
_ROTATE = np.uint64(0x9E3779B97F4A7C15)
# Scripts that put no spaces between words: each character counts as one. Thai to Lao, Khmer, kana, Han, Hangul.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]+")


def tokens_of(text: str) -> list[str]:
    """Words and runs of punctuation, case aside; of scripts without spaces, characters.

    Example:
        >>> tokens_of("Don't x+=1; \\u4f60\\u597d")
        ['don', "'", 't', 'x', '+=', '1', ';', '\\u4f60', '\\u597d']
    """
    return _TOKEN.findall(text.casefold())


def digest_of(text: str) -> int:
    """A 64-bit number that equal texts share, case and spaces aside."""
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def digests_of(texts: Iterable[str]) -> Digests:
    return np.fromiter((digest_of(text) for text in texts), dtype=np.uint64)


def uniform(digests: Digests, seed: int, stream: int = 0) -> Counts:
    """(N,) numbers in 0..1 that depend on text and seed alone, so that neither order nor chunks of a pool matter."""
    salt = mixed(np.array([(seed << 8) + stream + 1], dtype=np.uint64) * _ROTATE)
    return (mixed(mixed(digests) ^ salt) >> np.uint64(11)).astype(np.float64) / 2.0**53 + 2.0**-54


@dataclass(frozen=True)
class Words:
    """The words of some texts."""

    ids: Digests
    """(W,)"""
    ends: NDArray[np.int64]
    """(N,) words up to the end of each text."""

    def __len__(self) -> int:
        return len(self.ends)

    def ngrams(self, size: int) -> tuple[Digests, NDArray[np.bool_]]:
        """((W,) digest of the n-gram that ends at each word, (W,) whether it lies in one text)."""
        grams = self.ids
        for _ in range(1, size):
            before = np.concatenate([np.zeros(1, dtype=np.uint64), grams[:-1]]) if len(grams) else grams
            grams = mixed((before * _ROTATE) ^ self.ids)
        return grams, self.places() >= size - 1

    def places(self) -> NDArray[np.int64]:
        """(W,) place of each word in its text."""
        lengths = np.diff(self.ends, prepend=0)
        return np.arange(len(self.ids)) - np.repeat(self.ends - lengths, lengths)

    def rows(self) -> NDArray[np.int64]:
        """(W,) the text of each word."""
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))

    def sums(self, values: Counts) -> Counts:
        """(N,) sum over the words of each text of (W,) values, rounded once: what stands around a text changes no bit of it."""
        listed, ends = values.tolist(), self.ends.tolist()
        return np.array([math.fsum(listed[start:end]) for start, end in pairwise([0, *ends])])


class WordReader:
    """Makes numbers of words; a word's number is a digest, so that forgetting it costs time and nothing else."""

    def __init__(self, split: Callable[[str], list[str]] = tokens_of) -> None:
        self._split = split
        self._known: dict[str, int] = {}

    def read(self, texts: Sequence[str]) -> Words:
        """The words of `texts`."""
        if len(self._known) > _MAX_KEPT_WORDS:
            self._known.clear()
        ids: list[int] = []
        ends = np.zeros(len(texts), dtype=np.int64)
        for place, text in enumerate(texts):
            ids += map(self._id, self._split(text))
            ends[place] = len(ids)
        return Words(np.array(ids, dtype=np.uint64), ends)

    def _id(self, word: str) -> int:
        known = self._known.get(word)
        if known is None:
            known = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
            self._known[word] = known
        return known


def best_strength(counts: Counts, totals: Counts | float, prior: Counts) -> float:
    """How many observations a prior should count for: the power of two under which the counts predict each other best.

    Each observation is predicted from all others: ``(c - 1 + a q) / (n - 1 + a)``. Source: leave-one-out smoothing with a Dirichlet
    prior, Zhai & Lafferty 2002, section 4.

    Args:
        counts: of events; `totals`: of all events under the same condition; `prior`: probability that the prior gives the event.
    """
    chosen = counts > 0
    c, q = counts[chosen], prior[chosen]
    n = np.broadcast_to(np.asarray(totals, dtype=np.float64), counts.shape)[chosen]
    strengths = [2.0**power for power in range(-2, 25)]
    gains = [float(np.sum(c * np.log((c - 1 + a * q) / (n - 1 + a)))) for a in strengths]
    return strengths[int(np.argmax(gains))]
