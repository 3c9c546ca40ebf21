"""Ways to thin out what one model changes of the base: by magnitude, at random, by rank and chance, without the outliers.

Each looks at the whole tensor first and returns a function of (piece) that gives the thinned change.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece, Settings
from ftcli.merging.randomness import Chances
from ftcli.merging.selection import Largest, largest

Thin = Callable[[Piece], Array]
"""One model's change, thinned."""
Thinning = Callable[[Inputs, Settings], list[Thin]]
"""One function for each model."""


def whole(inputs: Inputs, settings: Settings) -> list[Thin]:
    """Everything."""
    return [_all_of(model) for model in range(inputs.num_models)]


def _all_of(model: int) -> Thin:
    return lambda piece: piece.deltas[model]


def _magnitude(model: int) -> Thin:
    return lambda piece: np.abs(piece.deltas[model])


def num_kept(density: float, size: int) -> int:
    """How many of `size` elements a density keeps: at least one.

    Example:
        >>> num_kept(0.5, 5), num_kept(0.01, 5), num_kept(0.7, 10)
        (2, 1, 7)
    """
    return 0 if density <= 0 else max(1, min(size, int(density * size)))


def by_magnitude(inputs: Inputs, settings: Settings) -> list[Thin]:
    """The largest changes; of equal ones those in front. Where it was found over all tensors which they are, those."""
    densities = settings["density"]
    if inputs.limits:
        return [_all_of(model) if densities[model] >= 1 else _within(model, limit) for model, limit in enumerate(inputs.limits)]
    size = inputs.shape[0] * inputs.shape[1]
    thinned = [model for model, density in enumerate(densities) if density < 1]
    found = largest(inputs, [(_magnitude(model), [num_kept(densities[model], size)]) for model in thinned])
    chosen = dict(zip(thinned, found, strict=True))
    return [_within(model, *chosen[model]) if model in chosen else _all_of(model) for model in range(inputs.num_models)]


def _within(model: int, lower: Largest, upper: Largest | None = None) -> Thin:
    """Those among `lower` and not among `upper`."""

    def thin(piece: Piece) -> Array:
        sizes = np.abs(piece.deltas[model])
        mask = lower.mask(sizes, piece.index)
        if upper is not None:
            mask &= ~upper.mask(sizes, piece.index)
        return piece.deltas[model] * mask

    return thin


def without_outliers(inputs: Inputs, settings: Settings) -> list[Thin]:
    """floor(density * n) changes of middling size: the `gamma` largest are dropped, then the smallest."""
    densities, size = settings["density"], inputs.shape[0] * inputs.shape[1]
    wanted: list[tuple[Thin, list[int]]] = []
    for model, (density, gamma) in enumerate(zip(densities, settings["gamma"], strict=True)):
        count = size if density >= 1 else num_kept(density, size)
        num_dropped = min(int(gamma * size), size - count)
        wanted.append((_magnitude(model), [num_dropped + count, num_dropped]))
    return [
        _all_of(model) if densities[model] >= 1 else _within(model, lower, upper)
        for model, (lower, upper) in enumerate(largest(inputs, wanted))
    ]


def at_random(inputs: Inputs, settings: Settings) -> list[Thin]:
    """Each change is kept with probability `density` and divided by it: its expectation is the change itself."""
    return [_at_random(inputs, model, density, settings["rescale"]) for model, density in enumerate(settings["density"])]


def _at_random(inputs: Inputs, model: int, density: float, rescale: bool | str) -> Thin:
    if density >= 1:
        return _all_of(model)
    scale = np.float32(1 / density if rescale is True and density > 0 else 1)
    chances = Chances.of(density)

    def thin(piece: Piece) -> Array:
        thinned: Array = piece.deltas[model] * scale
        thinned *= inputs.randomness.kept(model, piece.start, piece.shape, chances)
        return thinned

    return thin


def by_rank(inputs: Inputs, settings: Settings) -> list[Thin]:
    """Each change is kept with a probability that grows with its rank in its row, and divided by it.

    The probabilities run evenly from density - epsilon (smallest) to density + epsilon; a row of one has density itself.
    """
    pairs = zip(settings["density"], settings["epsilon"], strict=True)
    return [_by_rank(inputs, model, density, epsilon, settings["rescale"]) for model, (density, epsilon) in enumerate(pairs)]


def _by_rank(inputs: Inputs, model: int, density: float, epsilon: float, rescale: bool | str) -> Thin:
    if density >= 1:
        return _all_of(model)
    columns = inputs.shape[1]
    steps = np.linspace(-epsilon, epsilon, columns) if columns > 1 else np.zeros(1)
    probabilities = density + steps
    chances = Chances.of(probabilities)
    factors = (1 / probabilities if rescale is True else np.ones(columns)).astype(np.float32)

    def thin(piece: Piece) -> Array:
        delta = piece.deltas[model]
        order = _rows_in_order(delta)
        factor = np.empty(delta.shape, np.float32)
        factor.reshape(-1)[order] = factors * inputs.randomness.kept(model, piece.start, piece.shape, chances, order)
        factor *= delta
        return factor

    return thin


def _rows_in_order(values: Array) -> NDArray[np.intp]:
    """``(rows, columns)`` flat indices: those of each row, from the smallest magnitude to the largest, of equal ones from the front."""
    # magnitude above, index below: sorting these sorts by magnitude, and equal ones by index
    keys = np.abs(values).view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(values.size, dtype=np.uint64).reshape(values.shape)
    keys.sort(axis=1)
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.intp)


def rescaled(inputs: Inputs, model: int, thin: Thin) -> Thin:
    """`thin` times what brings back the sum of magnitudes, as mergekit does it."""
    before = after = 0.0
    for piece in inputs.pieces():
        before += float(np.abs(piece.deltas[model]).sum(dtype=np.float64))
        after += float(np.abs(thin(piece)).sum(dtype=np.float64))
    if before < 1e-7 or after < 1e-7:
        return thin
    scale = np.float32(before / after)
    return lambda piece: thin(piece) * scale
