"""Solved examples in front of a question: which, and in which order. All choices are pure functions of the seed and the rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftcli.data.sources import Source
from ftcli.errors import DataError
from ftcli.evaluation.tasks.questions import listed_rows, question_key
from ftcli.evaluation.tasks.retrieve_index import Bm25
from ftcli.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.evaluation.tasks.task import Subject
    from ftcli.models.tokenizer import Tokenizer

Rows = Sequence[tuple[str, dict[str, Any]]]


Choose = Literal["fixed", "first", "random", "nearest", "embedding"]
Embed = Callable[[Sequence[str]], "NDArray[np.float32]"]
"""Texts to ``(n, D)`` vectors of length 1."""


class Shots(Spec):
    """Solved examples. None of them asks what the row asks: such a one, known by its words, is passed over and the next is taken."""

    count: int = Field(ge=1)
    """How many."""
    source: Source | None = None
    """Where they come from; the default is the task's own rows."""
    choose: Choose = "fixed"
    """`fixed` takes the first of a shuffle for all questions, so that they are computed once; `first` takes the first rows as they
    stand; `random` draws for every question;
    `nearest` takes the most similar questions by BM25, the most similar last; `embedding` by the cosine of the mean of the model's own
    last hidden states, which says little of a base model that was trained for nothing of the kind."""
    separator: str = "\n\n"
    """What stands between examples."""
    seed: int = Field(default=17, ge=0)
    """Of the shuffle and the draws."""


def solved_text(prompt: str, reference: str, tokenizer: Tokenizer) -> str:
    """A prompt with its answer, and with the end of the turn where the prompt is a chat: a turn left open teaches not to end it."""
    end = tokenizer.end_of_turn if tokenizer.chat_template is not None else None
    return prompt + reference + (end if end and end in prompt else "")


def embedding_of(subject: Subject) -> Embed:
    """The vectors of `choose: embedding`, by the model that is evaluated."""

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        from ftcli.evaluation.tasks.retrieval import Embedder

        return Embedder(subject, "mean").embed(texts, lambda done, total: None)

    return embed


@dataclass(frozen=True, slots=True)
class Examples:
    """What stands before each question, and what a reader must know of it."""

    texts: list[str]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Questions:
    """Rows with what is asked of each."""

    where: Sequence[str]
    prompts: Sequence[str]
    solved: Sequence[str]
    """The prompts with their answers."""
    bare: Sequence[str] = ()
    """The prompts without the passages that were put in front of their questions; empty where there are none."""

    def known_by(self) -> list[str]:
        """By which equal questions are known."""
        return [question_key(prompt) for prompt in (self.bare or self.prompts)]


def before_each(shots: Shots | None, asked: Questions, solve: Callable[[Rows], Questions], embed: Embed) -> Examples:
    """What stands before each question: never one that asks the same, from whatever row it is.

    Args:
        asked: the task's own rows.
        solve: reads the rows of another source.
        embed: for `choose: embedding`.

    Raises:
        DataError: there are too few rows to choose from.
    """
    if shots is None:
        return Examples([""] * len(asked.prompts), [])
    pool = asked if shots.source is None else solve(list(shots.source.rows()))
    same = _same_questions(asked, pool)
    most = max(map(len, same), default=0)
    if len(pool.prompts) - most < shots.count:
        left = len(pool.prompts) - most
        unlike = " that ask something else" if most > (shots.source is None) else ""
        raise DataError(f"{shots.count} examples are asked for, and there are {left}{unlike} to choose from")
    ranked = _ranking(shots, asked.prompts, pool.prompts, embed)
    texts = [
        "".join(pool.solved[place] + shots.separator for place in _places(shots, row, len(pool.prompts), same[row], most, ranked))
        for row in range(len(asked.prompts))
    ]
    return Examples(texts, _note_of_same(shots, asked, same))


def _same_questions(asked: Questions, pool: Questions) -> list[frozenset[int]]:
    """For each question the places in the pool that ask the same."""
    places: dict[str, list[int]] = {}
    for place, key in enumerate(pool.known_by()):
        places.setdefault(key, []).append(place)
    found = {key: frozenset(listed) for key, listed in places.items()}
    return [found.get(key, frozenset()) for key in asked.known_by()]


def _note_of_same(shots: Shots, asked: Questions, same: Sequence[frozenset[int]]) -> list[str]:
    """One line where rows stand among the examples, or are asked twice."""
    is_own = shots.source is None
    found = [where for where, places in zip(asked.where, same, strict=True) if len(places) > is_own]
    if not found:
        return []
    what = "ask what another row asks" if shots.source is None else f"are asked in the examples of `{shots.source.label()}`, too"
    return [f"{len(found)} of {len(same)} rows {what} ({listed_rows(found)}): no row was shown an example of its own question"]


def _ranking(shots: Shots, prompts: Sequence[str], pool: Sequence[str], embed: Embed) -> Callable[[int, int], list[int]] | None:
    """For a prompt so many places of the most similar questions of the pool, the best first; None where similarity does not count."""
    if shots.choose == "nearest":
        index = Bm25(pool)
        return lambda row, count: index.nearest(prompts[row], count)
    if shots.choose != "embedding":
        return None
    theirs = embed(pool)
    mine = theirs if pool is prompts else embed(prompts)
    return lambda row, count: [int(place) for place in (-(theirs @ mine[row])).argsort(kind="stable")[:count]]


def _places(
    shots: Shots, row: int, size: int, same: frozenset[int], most: int, ranked: Callable[[int, int], list[int]] | None
) -> list[int]:
    """Places in the pool of the examples for one question.

    Args:
        size: of the pool.
        same: places that ask this very question: the next ones take theirs.
        most: places that ask the same as any question does.
    """
    if ranked is not None:
        nearest = [place for place in ranked(row, shots.count + len(same)) if place not in same]
        return nearest[: shots.count][::-1]
    if shots.choose == "first":
        return [place for place in range(min(size, shots.count + len(same))) if place not in same][: shots.count]
    order = random.Random(f"{shots.seed}/{row}" if shots.choose == "random" else str(shots.seed))
    # As many for every question, so that `fixed` draws the same ones.
    drawn = order.sample(range(size), min(size, shots.count + max(1, most)))
    return [place for place in drawn if place not in same][: shots.count]
