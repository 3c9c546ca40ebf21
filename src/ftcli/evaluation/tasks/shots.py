"""Solved examples in front of a question: which, and in which order. All choices are pure functions of the seed and the rows."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field

from ftcli.data.leakage import words_of
from ftcli.data.sources import Source
from ftcli.errors import DataError
from ftcli.spec import Spec

Rows = Sequence[tuple[str, dict[str, Any]]]


class Shots(Spec):
    """Solved examples, from other rows than the one that is asked."""

    count: int = Field(ge=1)
    """How many."""
    source: Source | None = None
    """Where they come from; the default is the task's own rows, never the one that is asked."""
    choose: Literal["fixed", "first", "random", "nearest"] = "fixed"
    """`fixed` takes the first of a shuffle for all questions, so that they are computed once; `first` takes the first rows as they
    stand; `random` draws for every question;
    `nearest` takes the most similar questions by BM25, the most similar last."""
    separator: str = "\n\n"
    """What stands between examples."""
    seed: int = Field(default=17, ge=0)
    """Of the shuffle and the draws."""


def before_each(
    shots: Shots | None, prompts: Sequence[str], solved: Sequence[str], solve: Callable[[Rows], tuple[list[str], list[str]]]
) -> list[str]:
    """What stands before each of `prompts`.

    Args:
        prompts, solved: of the task's own rows, without and with their answers.
        solve: makes both of the rows of another source.

    Raises:
        DataError: there are too few rows to choose from.
    """
    if shots is None:
        return [""] * len(prompts)
    is_own = shots.source is None
    pool_prompts, pool = (prompts, solved) if shots.source is None else solve(list(shots.source.rows()))
    if len(pool) - is_own < shots.count:
        raise DataError(f"{shots.count} examples are asked for, and there are {len(pool) - is_own} to choose from")
    index = Bm25(pool_prompts) if shots.choose == "nearest" else None
    return [
        "".join(pool[place] + shots.separator for place in _places(shots, row, prompt, len(pool), is_own, index))
        for row, prompt in enumerate(prompts)
    ]


def _places(shots: Shots, row: int, prompt: str, size: int, is_own: bool, index: Bm25 | None) -> list[int]:
    """Places in the pool of the examples for one question."""
    if index is not None:
        nearest = [place for place in index.nearest(prompt, shots.count + 1) if not (is_own and place == row)]
        return nearest[: shots.count][::-1]
    if shots.choose == "first":
        return [place for place in range(min(size, shots.count + 1)) if not (is_own and place == row)][: shots.count]
    order = random.Random(f"{shots.seed}/{row}" if shots.choose == "random" else str(shots.seed))
    # One more than needed: where the question itself is drawn, the next takes its place.
    drawn = order.sample(range(size), min(size, shots.count + 1))
    return [place for place in drawn if not (is_own and place == row)][: shots.count]


class Bm25:
    """Texts ranked by the words they share with a query. Source: Robertson & Zaragoza 2009, section 3 (BM25), k1 = 1.2, b = 0.75."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.lengths: list[int] = []
        self.places: dict[str, list[tuple[int, int]]] = {}
        for place, text in enumerate(texts):
            counts = Counter(words_of(text))
            self.lengths.append(sum(counts.values()))
            for word, count in counts.items():
                self.places.setdefault(word, []).append((place, count))
        self.mean_length = max(1.0, sum(self.lengths) / max(1, len(self.lengths)))

    def nearest(self, query: str, count: int) -> list[int]:
        """Places of the best texts, the best first; of equal ones the earlier, and earlier texts where nothing is shared.

        Example:
            >>> Bm25(["a cat sat", "a dog ran", "the cat and the dog"]).nearest("dog and cat", 2)
            [2, 0]
        """
        scores = [0.0] * len(self.lengths)
        for word in dict.fromkeys(words_of(query)):
            found = self.places.get(word, ())
            weight = math.log(1 + (len(self.lengths) - len(found) + 0.5) / (len(found) + 0.5))
            for place, occurrences in found:
                shrunk = 1.2 * (0.25 + 0.75 * self.lengths[place] / self.mean_length)
                scores[place] += weight * occurrences * 2.2 / (occurrences + shrunk)
        return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]
