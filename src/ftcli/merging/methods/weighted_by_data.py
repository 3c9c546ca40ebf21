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
            if statistic.size and not statistic.min() >= 0:
                tensor = inputs.randomness.tensor
                hint = "gather them with `ftcli merge-statistics MODEL --kind fisher`"
                raise NoMean(f"tensor `{tensor}`: its Fisher statistics have negative numbers or NaN, and are no squares", hint=hint)
            share = statistic * np.float64(weight)
            total += share * model
            divisor += share
        return np.divide(total, divisor, out=plain.astype(np.float64), where=divisor > 0).astype(np.float32)

    return merge


def regmean(inputs: Inputs, settings: Settings) -> PieceFunction:
    """The weights whose outputs are nearest to each model's own on that model's data; tensors without statistics are averaged.

    The statistics of a linear layer ``(out, in)`` are the ``(in, in)`` Gram matrix of its inputs, of which all but the diagonal is
    multiplied by `alpha`.
    """
    weights = settings["weight"]
    grams = inputs.whole_statistics()
    if not grams:
        return lambda piece: weighted_sum(piece.models, normalised(weights))
    scaled = [_shrunk(gram, settings["alpha"]) * weight for gram, weight in zip(grams, weights, strict=True)]
    total = sum(scaled, start=np.zeros_like(scaled[0]))

    def merge(piece: Piece) -> Array:
        target = sum(
            (model.astype(np.float64) @ gram for model, gram in zip(piece.models, scaled, strict=True)), start=np.zeros(piece.shape)
        )
        # W is (out, in): W G = sum W_i G_i; inputs that no data reached leave G singular
        solution, *_ = np.linalg.lstsq(total.T, target.T, rcond=None)
        return np.asarray(solution.T, np.float32)

    return merge


def _shrunk(gram: Array, alpha: float) -> NDArray[np.float64]:
    wide = gram.astype(np.float64)
    return wide * alpha + np.diag(np.diag(wide)) * (1 - alpha)
