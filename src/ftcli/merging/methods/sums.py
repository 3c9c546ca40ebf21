"""Weighted sums of arrays, and inner products of whole tensors in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece


def weighted_sum(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    """Sum of w * array; what has weight 0 is left out, weight 1 is exact."""
    terms = [(array, np.float32(weight)) for array, weight in zip(arrays, weights, strict=True) if weight != 0]
    if not terms:
        return np.zeros_like(arrays[0])
    array, weight = terms[0]
    if len(terms) == 1:
        return array if weight == 1 else array * weight
    total, scratch = array * weight, np.empty_like(array)
    for array, weight in terms[1:]:
        total += array if weight == 1 else np.multiply(array, weight, out=scratch)
    return total


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights that sum to 1, of a sum that is not 0."""
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def inner_products(inputs: Inputs, *, deltas: bool) -> NDArray[np.float64]:
    """``(models, models)`` inner products of the models' tensors, or of what they change of the base."""
    num = inputs.num_models
    total = np.zeros((num, num), np.float64)
    for piece in inputs.pieces():
        total += piece_inner_products(piece.deltas if deltas else piece.models)
    return total


def piece_inner_products(arrays: Sequence[Array]) -> NDArray[np.float64]:
    """``(models, models)`` inner products of arrays. Not by BLAS, whose order of summation depends on its threads."""
    wide = [array.reshape(-1).astype(np.float64) for array in arrays]
    products = np.zeros((len(wide), len(wide)), np.float64)
    for i, first in enumerate(wide):
        for j in range(i, len(wide)):
            products[i, j] = products[j, i] = np.einsum("i,i->", first, wide[j])
    return products


def row_inner_products(arrays: Sequence[Array]) -> NDArray[np.float64]:
    """``(models, models, rows)`` inner products, row by row."""
    rows = arrays[0].shape[0]
    wide = [array.astype(np.float64) for array in arrays]
    products = np.zeros((len(wide), len(wide), rows), np.float64)
    for i, first in enumerate(wide):
        for j in range(i, len(wide)):
            products[i, j] = products[j, i] = np.einsum("rc,rc->r", first, wide[j])
    return products


def on_base(piece: Piece, change: Array) -> Array:
    """The base with `change` added; where nothing changes, the base's own bits, and where all that an only model changes does, its own.

    Elsewhere the changes' own rounding remains, which is more than a step of the result where base and change nearly cancel.
    """
    assert piece.base is not None
    merged = piece.base + change
    if len(piece.models) == 1:
        # base + (model - base) need not be the model
        np.copyto(merged, piece.models[0], where=change == piece.deltas[0])
    return merged
