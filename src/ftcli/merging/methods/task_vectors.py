"""Sums of what models change of their base: task arithmetic, TIES, DARE, DELLA, breadcrumbs.

They differ in how each change is thinned (`sparse`), and in whether a sign is elected for every weight.
Sources: Ilharco et al. 2022, arXiv:2212.04089 (task arithmetic); Yadav et al. 2023, arXiv:2306.01708 (TIES); Yu et al. 2023,
arXiv:2311.03099 (DARE); Deep et al. 2024, arXiv:2406.11617 (DELLA); Davari and Belilovsky 2023, arXiv:2312.06795 (breadcrumbs).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ftcli.merging.methods.sparse import Thinning, at_random, by_magnitude, by_rank, rescaled, whole, without_outliers
from ftcli.merging.methods.sums import normalised, on_base, weighted_sum
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece, PieceFunction, Settings


def _merged(inputs: Inputs, settings: Settings, thinning: Thinning, elects: bool) -> PieceFunction:
    thins = thinning(inputs, settings)
    # for the methods that keep values as they are, `rescale: true` has but one meaning
    if settings.get("rescale") == "l1" or (settings.get("rescale") is True and thinning in (by_magnitude, without_outliers)):
        thins = [rescaled(inputs, model, thin) for model, thin in enumerate(thins)]
    scale = np.float32(settings["lambda"])

    def merge(piece: Piece) -> Array:
        changes = [thin(piece) for thin in thins]
        mixed = elected(changes, settings) if elects else _added(changes, settings)
        return on_base(piece, mixed if scale == 1 else mixed * scale)

    return merge


def _added(changes: Sequence[Array], settings: Settings) -> Array:
    weights = settings["weight"]
    return weighted_sum(changes, normalised(weights) if settings["normalize"] else weights)


def elected(changes: Sequence[Array], settings: Settings) -> Array:
    """Sum of the weighted changes whose sign is the elected one; divided by the weights (or number) of those with `normalize`.

    Where the election is a draw nothing changes. The divisor sums magnitudes of weights, so that negative ones cannot bring it near 0.
    """
    weights, elect, divide = settings["weight"], settings["elect"], settings["divide"]
    is_weighted = elect == "weighted"
    voters = [np.sign(change) for change in changes] if elect == "count" else changes
    direction = np.sign(weighted_sum(voters, weights if is_weighted else (1,) * len(voters)))
    total, term = np.zeros_like(direction), np.empty_like(direction)
    divisor = np.zeros_like(direction) if settings["normalize"] else None
    for change, weight in zip(changes, weights, strict=True):
        if is_weighted and weight == 0:
            continue  # it has no vote
        # Above 0 is what goes the elected way; with a negative weight it votes for the other one.
        np.multiply(change, direction, out=term)
        (np.minimum if is_weighted and weight < 0 else np.maximum)(term, np.float32(0), out=term)
        if divisor is not None:
            divisor += (term != 0) * np.float32(abs(weight) if divide == "weights" else 1)
        total += term if weight == 1 else np.multiply(term, np.float32(weight), out=term)
    if divisor is not None:
        # the total is 0 where nobody agrees
        np.maximum(divisor, np.float32(1e-30), out=divisor)
        total /= divisor
    total *= direction
    return total


def task_arithmetic(inputs: Inputs, settings: Settings) -> PieceFunction:
    """base + lambda * sum of w * change."""
    return _merged(inputs, settings, whole, elects=False)


def ties(inputs: Inputs, settings: Settings) -> PieceFunction:
    """Trim each change to its largest `density`, elect a sign, average those that agree."""
    return _merged(inputs, settings, by_magnitude, elects=True)


def dare_linear(inputs: Inputs, settings: Settings) -> PieceFunction:
    """Drop changes at random, divide the rest by `density`, add."""
    return _merged(inputs, settings, at_random, elects=False)


def dare_ties(inputs: Inputs, settings: Settings) -> PieceFunction:
    """Drop changes at random, divide the rest by `density`, elect a sign, add those that agree."""
    return _merged(inputs, settings, at_random, elects=True)


def della_linear(inputs: Inputs, settings: Settings) -> PieceFunction:
    """Drop changes at random, small ones more often, divide each by its probability, add."""
    return _merged(inputs, settings, by_rank, elects=False)


def della(inputs: Inputs, settings: Settings) -> PieceFunction:
    """As della_linear, with the election of a sign."""
    return _merged(inputs, settings, by_rank, elects=True)


def breadcrumbs(inputs: Inputs, settings: Settings) -> PieceFunction:
    """Drop the largest and the smallest changes, add."""
    return _merged(inputs, settings, without_outliers, elects=False)


def breadcrumbs_ties(inputs: Inputs, settings: Settings) -> PieceFunction:
    """As breadcrumbs, with the election of a sign."""
    return _merged(inputs, settings, without_outliers, elects=True)


def della_fault(settings: Settings) -> str | None:
    """Probabilities of della that are none."""
    for density, epsilon in zip(settings["density"], settings["epsilon"], strict=True):
        if density < 1 and (density <= epsilon or density + epsilon > 1):
            return f"density {density:g} and epsilon {epsilon:g}: density - epsilon must be above 0, density + epsilon at most 1"
    return None
