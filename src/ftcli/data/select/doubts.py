"""Reasons to doubt a selection: it was made, and says little of the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIN_TASK_WORDS = 100
MIN_KNOWN_WORDS = 0.25
"""Texts of one language share more of their words than this, whatever they tell of."""
MAX_UNLIKE = 0.1
FLAT = 0.01
"""Bits, nats or cosine: less than any way measures between two texts that differ."""
# Ways whose score is above 0 where a row is nearer to the task than to the pool.
_SIGNED = ("perplexity", "ngrams")


@dataclass(frozen=True)
class Evidence:
    """What is known of a selection."""

    by: str
    reads_words: bool
    """The way goes by words, not by what a model makes of them."""
    num_asked: int
    num_chosen: int
    num_unlike: int
    """Chosen rows with a score of 0 or less."""
    pool_scores: Mapping[str, float]
    chosen_scores: Mapping[str, float]
    kl_pool: float
    kl_chosen: float
    num_task_rows: int
    num_task_words: int
    num_different: int
    """Different words of the task set."""
    num_known: int
    """Of these, how many stand in the pool."""


def doubts(found: Evidence) -> list[str]:
    """Each reason in a sentence with its figures; none for a selection that shows no sign of being void."""
    told = []
    if found.num_chosen < found.num_asked:
        told.append(
            f"{found.num_asked:,} rows were asked for and {found.num_chosen:,} could be chosen: what was allowed was taken whole, like the "
            "task or not"
        )
    if found.by == "random":
        return told
    return [*told, *_of_the_task(found), *_of_the_scores(found)]


def _of_the_task(found: Evidence) -> list[str]:
    told = []
    if found.num_task_words < MIN_TASK_WORDS:
        rows = "1 row" if found.num_task_rows == 1 else f"{found.num_task_rows:,} rows"
        told.append(f"the task set is {rows} of {found.num_task_words:,} words in all: too few to tell what its text is like")
    if found.reads_words and found.num_known < MIN_KNOWN_WORDS * found.num_different:
        told.append(
            f"of {found.num_different:,} different words of the task set {found.num_known:,} stand in the pool: `--by {found.by}` goes by "
            "common words; another pool, or `--by embeddings`"
        )
    return told


def _of_the_scores(found: Evidence) -> list[str]:
    told = []
    pool, chosen = found.pool_scores, found.chosen_scores
    if f"{found.kl_chosen:.3f}" == f"{found.kl_pool:.3f}":
        told.append(f"the n-grams of the chosen rows are no nearer to the task than the pool's ({found.kl_pool:.3f} nats)")
    elif found.kl_chosen > found.kl_pool:
        told.append(
            f"the n-grams of the chosen rows are further from the task ({found.kl_chosen:.3f} nats) than the pool's ({found.kl_pool:.3f}): "
            "random rows would be nearer"
        )
    if pool and chosen and chosen["50%"] - pool["50%"] < FLAT:
        told.append(
            f"scores are flat: {pool['50%']:.3g} in the middle of the pool, {chosen['50%']:.3g} in the middle of the chosen rows; the "
            "order is chance"
        )
    elif found.by in _SIGNED and found.num_unlike > MAX_UNLIKE * found.num_chosen:
        told.append(
            f"{found.num_unlike:,} of {found.num_chosen:,} chosen rows score 0 or less, nearer to the pool than to the task: ask for "
            "fewer, or give another pool"
        )
    elif pool and chosen and chosen["1%"] < pool["50%"]:
        told.append(
            f"the last chosen rows score {chosen['1%']:.3g}, below the middle of the pool ({pool['50%']:.3g}): ask for fewer, or give a "
            "larger pool"
        )
    return told
