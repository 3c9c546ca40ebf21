"""Difference of cross-entropies (Moore-Lewis): rows that a model of the task set finds likelier than a model of the pool.

Source: Moore & Lewis 2010, "Intelligent selection of language model training data", ACL. There both models are trained apart, on texts
of one size; with a task set of some hundred rows the domain's model is better adapted from the general one. Or both are language models.
Legend: ``W`` words of all texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcli.data.select.way import sample_of
from ftcli.data.select.words import WordReader, Words, best_strength
from ftcli.units import NATS_PER_BIT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ftcli.data.select.pool import Pool
    from ftcli.data.select.way import Tell

ORDER = 2
GENERAL_ROWS = 5000
GENERAL_CHARS = 2000
DAMPING_WORDS = 20
"""Words on which both models agree that every row is given: the mean over few words is mostly chance, and the shortest rows would win."""

BitsPerByte = Callable[[Sequence[str]], "NDArray[np.float64]"]
"""(n,) bits that a model needs for a byte of each text."""


@dataclass(frozen=True)
class _Table:
    """Counts by digest."""

    keys: NDArray[np.uint64]
    counts: NDArray[np.float64]

    @classmethod
    def of(cls, digests: NDArray[np.uint64]) -> _Table:
        keys, counts = np.unique(digests, return_counts=True)
        return cls(keys, counts.astype(np.float64))

    def __getitem__(self, digests: NDArray[np.uint64]) -> NDArray[np.float64]:
        if not len(self.keys):
            return np.zeros(len(digests))
        places = np.minimum(np.searchsorted(self.keys, digests), len(self.keys) - 1)
        return np.where(self.keys[places] == digests, self.counts[places], 0.0)


class NgramModels:
    """A model of the pool, and the same model adapted to the task set.

    The general model smooths each order towards the next lower one (MacKay & Peto 1995): ``q(w | h) = (C(hw) + b q(w | h')) / (C(h) + b)``,
    the domain's each order towards the general one, scaled by what the lower orders have found (as Kneser, Peters & Klakow 1997, not
    normalised again): ``p(w | h) = (c(hw) + a q(w | h) r(w | h')) / (c(h) + a)`` with ``r = p / q``. Where the task set says nothing,
    the two agree, so that a small one does not condemn rows for words it has not seen. All strengths are by leave-one-out.
    """

    def __init__(self, domain: Words, general: Words) -> None:
        self._general, self._domain = _Counts(general), _Counts(domain)
        self._general_strengths: list[float] = []
        self._domain_strengths: list[float] = []
        for size in range(1, ORDER + 1):
            _, lower = self._ratios(general, size - 1)
            self._general_strengths.append(self._general.strength(general, size, lower))
            ratio, q = self._ratios(domain, size - 1)[0], self._general_probabilities(domain, size)
            self._domain_strengths.append(self._domain.strength(domain, size, q * ratio))

    def log_ratios(self, words: Words) -> NDArray[np.float64]:
        """(W,) nats that the domain's model needs less for each word."""
        return np.log(self._ratios(words, ORDER)[0])

    def _ratios(self, words: Words, order: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """((W,) p / q, (W,) q), from orders up to `order`."""
        ratio, q = np.ones(len(words.ids)), self._general_probabilities(words, order)
        for size in range(1, order + 1):
            general = self._general_probabilities(words, size)
            counts, totals, inside = self._domain.of(words, size)
            strength = self._domain_strengths[size - 1]
            ratio = np.where(inside, (counts / general + strength * ratio) / (totals + strength), ratio)
        return ratio, q

    def _general_probabilities(self, words: Words, order: int) -> NDArray[np.float64]:
        found = np.full(len(words.ids), 0.5 / max(1, self._general.num_words))
        for size in range(1, order + 1):
            counts, totals, inside = self._general.of(words, size)
            # before the strength of an order is known, its probabilities are those of the order below
            strength = self._general_strengths[size - 1] if size <= len(self._general_strengths) else np.inf
            if np.isfinite(strength):
                found = np.where(inside, (counts + strength * found) / (totals + strength), found)
        return found


class _Counts:
    """How often n-grams stand in a text, and what stands before their last word."""

    def __init__(self, words: Words) -> None:
        self.num_words = len(words.ids)
        self._grams: list[_Table] = []
        self._contexts: list[_Table] = []
        for size in range(1, ORDER + 1):
            grams, inside = words.ngrams(size)
            self._grams.append(_Table.of(grams[inside]))
            self._contexts.append(_Table.of(_contexts(words, size)[inside]))

    def of(self, words: Words, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """(W,) each: occurrences of the n-gram that ends at a word, of what stands before the word, whether there is one."""
        grams, inside = words.ngrams(size)
        totals = self._contexts[size - 1][_contexts(words, size)] if size > 1 else np.full(len(grams), float(self.num_words))
        return self._grams[size - 1][grams], totals, inside

    def strength(self, words: Words, size: int, prior: NDArray[np.float64]) -> float:
        """Of the (W,) prior, in occurrences; `words` are those that were counted."""
        grams, inside = words.ngrams(size)
        counts, totals, _ = self.of(words, size)
        _, first = np.unique(grams[inside], return_index=True)
        return best_strength(counts[inside][first], totals[inside][first], prior[inside][first])


def _contexts(words: Words, size: int) -> NDArray[np.uint64]:
    """(W,) digest of the words before each word that an n-gram of `size` looks at; one for all where there are none."""
    if size == 1 or not len(words.ids):
        return np.zeros_like(words.ids)
    grams, _ = words.ngrams(size - 1)
    return np.concatenate([np.zeros(1, dtype=np.uint64), grams[:-1]])


class Difference:
    """`--by perplexity`."""

    def __init__(self, seed: int, models: tuple[BitsPerByte, BitsPerByte] | None = None) -> None:
        """
        Args:
            models: of the domain and of text in general; without them n-gram models are made.
        """
        self.seed = seed
        self.unit = f"bits a {'word' if models is None else 'byte'} that the model of the task set needs less than the general one"
        self._models = models
        self._reader = WordReader()
        self._facts: dict[str, Any] = {}

    def fit(self, gold: Sequence[str], pool: Pool, tell: Tell) -> None:
        """An n-gram model of the task set and one of a sample of the pool."""
        if self._models is not None:
            return
        sample = sample_of(pool, GENERAL_ROWS, self.seed, GENERAL_CHARS, tell)
        self._ngrams = NgramModels(self._reader.read(gold), self._reader.read(sample))
        self._facts = {"order": ORDER, "general_rows": len(sample)}

    def score(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        groups = np.zeros(len(texts), dtype=np.int64)
        if self._models is not None:
            domain, general = self._models
            return general(texts) - domain(texts), groups
        words = self._reader.read(texts)
        gained = words.sums(self._ngrams.log_ratios(words)) / NATS_PER_BIT
        return gained / (DAMPING_WORDS + np.diff(words.ends, prepend=0)), groups

    def noise(self, digests: NDArray[np.uint64]) -> NDArray[np.float64]:
        return np.zeros(len(digests))

    def quotas(self, count: int) -> list[int]:
        return [count]

    def facts(self) -> dict[str, Any]:
        return self._facts
