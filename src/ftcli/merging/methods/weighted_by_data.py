"""Averages weighted by statistics gathered on data: Fisher and RegMean.

Sources: Matena and Raffel 2022, arXiv:2111.09832 (Fisher); Jin et al. 2023, arXiv:2212.09849 (RegMean).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.methods.method import NoMean
from ftcli.merging.methods.sums import normalised, weighted_sum
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece, PieceFunction, Settings

_ROUNDING = 1e-6
"""Share of the largest eigenvalue, of a Gram matrix of inputs of size 1, below which there may be nothing but float32's rounding."""


def fisher(inputs: Inputs, settings: Settings) -> PieceFunction:
    """Sum of w F model / sum of w F in every weight, F the diagonal of each model's Fisher matrix; where all F are 0 the plain average.

    Raises (when a piece is merged):
        NoMean: there is an F below 0.
    """
    weights = settings["weight"]

    def merge(piece: Piece) -> Array:
        plain = weighted_sum(piece.models, normalised(weights))
        if not piece.statistics:
            return plain
        total, divisor = np.zeros(piece.shape, np.float64), np.zeros(piece.shape, np.float64)
        for model, statistic, weight in zip(piece.models, piece.statistics, weights, strict=True):
            _require(bool(statistic.min(initial=0) >= 0 and statistic.max(initial=0) < np.inf), "Fisher", inputs)
            share = statistic * np.float64(weight)
            total += share * model
            divisor += share
        return np.divide(total, divisor, out=plain.astype(np.float64), where=divisor > 0).astype(np.float32)

    return merge


def regmean(inputs: Inputs, settings: Settings) -> PieceFunction:
    """The weights whose outputs are nearest to each model's own on that model's data; tensors without statistics are averaged.

    Where several are as near it is the one nearest to the mean: inputs that no data reached keep it. The statistics of a linear layer
    ``(out, in)`` are the ``(in, in)`` Gram matrix of its inputs, of which all but the diagonal is multiplied by `alpha`.

    Raises:
        NoMean: a Gram matrix is none.
    """
    weights, shares = settings["weight"], normalised(settings["weight"])
    grams = inputs.whole_statistics()
    if not grams:
        return lambda piece: weighted_sum(piece.models, shares)
    for gram in grams:
        _require(bool(np.isfinite(gram).all() and (np.diag(gram) >= 0).all()), "RegMean", inputs)
    scaled = [_shrunk(gram, settings["alpha"]) * weight for gram, weight in zip(grams, weights, strict=True)]
    inverse = _inverse(sum(scaled, start=np.zeros_like(scaled[0])))

    def merge(piece: Piece) -> Array:
        lead = piece.models[0].astype(np.float64)
        # of equal models exactly the model
        mean = lead + sum(share * (model - lead) for share, model in zip(shares, piece.models, strict=True))
        # W is (out, in): (W - mean) G = sum (W_i - mean) G_i
        target = sum(((model - mean) @ gram for model, gram in zip(piece.models, scaled, strict=True)), start=np.zeros(piece.shape))
        return np.asarray(mean + target @ inverse, np.float32)

    return merge


def _require(is_sum_of_squares: bool, kind: str, inputs: Inputs) -> None:
    """
    Raises:
        NoMean: it is none.
    """
    if not is_sum_of_squares:
        what = f"tensor `{inputs.randomness.tensor}`: its {kind} statistics have negative numbers, infinite ones or NaN, and are no squares"
        raise NoMean(what, hint=f"gather them with `ftcli merge-statistics MODEL --kind {kind.lower()}`")


def _inverse(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(n, n)``: X = Y @ it is the smallest matrix with X @ gram = Y in the directions in which `gram` holds more than rounding.

    It was summed in float32, whose rounding is relative to the inputs, and these may be of very different sizes: what is rounding is seen
    once every input has size 1.
    """
    size = np.sqrt(np.abs(np.diag(gram)))
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    values, vectors = np.linalg.eigh(gram * np.outer(scale, scale))
    is_kept = np.abs(values) > _ROUNDING * np.abs(values).max(initial=0)
    kept = vectors[:, is_kept]
    # X @ (size * kept) is known; the smallest X is that times the pseudo-inverse
    outer, inner = np.linalg.qr(size[:, None] * kept)
    return np.asarray((scale[:, None] * kept / values[is_kept]) @ np.linalg.solve(inner, outer.T))


def _shrunk(gram: Array, alpha: float) -> NDArray[np.float64]:
    wide = gram.astype(np.float64)
    return wide * alpha + np.diag(np.diag(wide)) * (1 - alpha)
