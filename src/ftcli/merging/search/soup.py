"""Greedy soup and WiSE-FT: averages of weights chosen by what an evaluation set says of them.

Sources: Wortsman et al. 2022, arXiv:2203.05482, algorithm 1 (greedy soup); Wortsman et al. 2021, arXiv:2109.01903 (WiSE-FT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftcli.merging.search.log import Evaluation, EvaluationLog


@dataclass(frozen=True)
class Soup:
    """What a greedy soup is made of."""

    chosen: tuple[int, ...]
    """Indices of the models in it, in the order they were taken."""
    order: tuple[int, ...]
    """All models, best first."""
    best: Evaluation
    """Of the soup."""
    singles: tuple[Evaluation, ...]
    """Of each model alone."""


def greedy_soup(num_models: int, evaluate: EvaluationLog) -> Soup:
    """Add models to the average from the best one on, each kept if the average does not get worse.

    At most 2 n - 1 evaluations; never below the best model, with which it begins.
    """
    singles = tuple(evaluate(average_of((index,), num_models)) for index in range(num_models))
    order = tuple(sorted(range(num_models), key=lambda index: (-singles[index].value, index)))
    chosen, best = order[:1], singles[order[0]]
    for index in order[1:]:
        tried = evaluate(average_of((*chosen, index), num_models))
        if tried.value >= best.value:
            chosen, best = (*chosen, index), tried
    return Soup(chosen, order, best, singles)


def average_of(chosen: Sequence[int], num_models: int) -> dict[str, list[float]]:
    """The candidate that is the mean of some models.

    Example:
        >>> average_of((2, 0), 3)
        {'weight': [0.5, 0.0, 0.5]}
    """
    return {"weight": [1 / len(chosen) if index in chosen else 0.0 for index in range(num_models)]}


def with_ends(alphas: Sequence[float]) -> tuple[float, ...]:
    """Points of the line with both ends, so that the best of them is never below the base or the model.

    Example:
        >>> with_ends((0.5, 1.0))
        (0.0, 0.5, 1.0)
    """
    return tuple(sorted({0.0, *alphas, 1.0}))


def sweep(alphas: Sequence[float], evaluate: EvaluationLog) -> tuple[list[Evaluation], Evaluation]:
    """Every point of the line from the base (0) to the model (1), and the best of them; of equal ones the nearest to the base."""
    points = [evaluate({"alpha": alpha}) for alpha in sorted(alphas)]
    return points, max(points, key=lambda point: point.value)
