"""Solved examples in front of a question: which, and in which order. All choices are pure functions of the seed and the rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftcli.data.sources import Source
from ftcli.errors import DataError
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
    """Solved examples, from other rows than the one that is asked."""

    count: int = Field(ge=1)
    """How many."""
    source: Source | None = None
    """Where they come from; the default is the task's own rows, never the one that is asked."""
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


def before_each(
    shots: Shots | None,
    prompts: Sequence[str],
    solved: Sequence[str],
    solve: Callable[[Rows], tuple[list[str], list[str]]],
    embed: Embed | None = None,
) -> list[str]:
    """What stands before each of `prompts`.

    Args:
        prompts, solved: of the task's own rows, without and with their answers.
        solve: makes both of the rows of another source.
        embed: for `choose: embedding`.

    Raises:
        DataError: there are too few rows to choose from, or the kind of task embeds nothing.
    """
    if shots is None:
        return [""] * len(prompts)
    is_own = shots.source is None
    pool_prompts, pool = (prompts, solved) if shots.source is None else solve(list(shots.source.rows()))
    if len(pool) - is_own < shots.count:
        raise DataError(f"{shots.count} examples are asked for, and there are {len(pool) - is_own} to choose from")
    ranked = _ranking(shots, prompts, pool_prompts, embed)
    return [
        "".join(pool[place] + shots.separator for place in _places(shots, row, len(pool), is_own, ranked)) for row in range(len(prompts))
    ]


def _ranking(shots: Shots, prompts: Sequence[str], pool: Sequence[str], embed: Embed | None) -> Callable[[int], list[int]] | None:
    """For a prompt the places of the most similar questions of the pool, the best first; None where similarity does not count."""
    if shots.choose == "nearest":
        index = Bm25(pool)
        return lambda row: index.nearest(prompts[row], shots.count + 1)
    if shots.choose != "embedding":
        return None
    if embed is None:
        raise DataError("`choose: embedding` is not for this kind of task", hint="choose: nearest")
    theirs = embed(pool)
    mine = theirs if pool is prompts else embed(prompts)
    return lambda row: [int(place) for place in (-(theirs @ mine[row])).argsort(kind="stable")[: shots.count + 1]]


def _places(shots: Shots, row: int, size: int, is_own: bool, ranked: Callable[[int], list[int]] | None) -> list[int]:
    """Places in the pool of the examples for one question."""
    if ranked is not None:
        nearest = [place for place in ranked(row) if not (is_own and place == row)]
        return nearest[: shots.count][::-1]
    if shots.choose == "first":
        return [place for place in range(min(size, shots.count + 1)) if not (is_own and place == row)][: shots.count]
    order = random.Random(f"{shots.seed}/{row}" if shots.choose == "random" else str(shots.seed))
    # One more than needed: where the question itself is drawn, the next takes its place.
    drawn = order.sample(range(size), min(size, shots.count + 1))
    return [place for place in drawn if not (is_own and place == row)][: shots.count]
