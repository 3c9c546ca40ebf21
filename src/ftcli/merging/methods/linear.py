"""Weighted averages of weights: linear, wise_ft, and passthrough. Source: Wortsman et al. 2022, arXiv:2203.05482 and arXiv:2109.01903."""

from __future__ import annotations

import numpy as np

from ftcli.merging.methods.sums import normalised, weighted_sum
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece, PieceFunction, Settings


def linear(inputs: Inputs, settings: Settings) -> PieceFunction:
    """Sum of w * model, divided by the sum of the weights with `normalize`."""
    weights = normalised(settings["weight"]) if settings["normalize"] else settings["weight"]
    return lambda piece: weighted_sum(piece.models, weights)


def wise_ft(inputs: Inputs, settings: Settings) -> PieceFunction:
    """(1 - alpha) * base + alpha * model; both ends are exact."""
    alpha = settings["alpha"]

    def merge(piece: Piece) -> Array:
        assert piece.base is not None
        return weighted_sum((piece.base, piece.models[0]), (1 - alpha, alpha))

    return merge


def passthrough(inputs: Inputs, settings: Settings) -> PieceFunction:
    """The model itself, times `scale`."""
    scale = np.float32(1.0 if settings["scale"][0] is None else settings["scale"][0])
    return lambda piece: piece.models[0] if scale == 1 else piece.models[0] * scale
