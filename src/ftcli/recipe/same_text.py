"""What one run has measured is measured by the next one on the same text: cut where it was cut, dropped where it was dropped."""

from __future__ import annotations

from dataclasses import dataclass

from ftcli.data.settings import EvaluationSource, OnOverflow
from ftcli.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Fit:
    """How a run fits the examples of an evaluation source to a length."""

    max_length: int
    on_overflow: OnOverflow
    num_virtual_tokens: int
    """Of its method."""


def fit_of(entry: EvaluationSource, recipe: Recipe) -> Fit:
    """How `recipe` fits the examples of `entry`."""
    data = recipe.data
    return Fit(entry.max_length or data.max_length, entry.on_overflow or data.on_overflow, recipe.method.num_virtual_tokens)


def with_fit(entry: EvaluationSource, recipe: Recipe, fit: Fit) -> EvaluationSource:
    """`entry` as `recipe` fits it as an earlier run did; as it is where it says its own lengths.

    It is left as it is, too, where more virtual tokens come before an example: with the longer examples of the other run it might be
    more than the model can see.
    """
    if recipe.method.num_virtual_tokens > fit.num_virtual_tokens:
        return entry
    wanted = {"max_length": fit.max_length, "on_overflow": fit.on_overflow}
    changes = {key: value for key, value in wanted.items() if getattr(entry, key) is None and getattr(recipe.data, key) != value}
    return entry.model_copy(update=changes)
