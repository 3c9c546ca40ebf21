"""RAM: changes that only one model makes are kept whole, shared ones are averaged. Source: arXiv:2601.13572."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.methods.sums import on_base
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece, PieceFunction, Settings


def ram(inputs: Inputs, settings: Settings) -> PieceFunction:
    """base + unique changes + mean of shared ones; a change is what exceeds `epsilon`."""
    return _merged(np.ones(inputs.num_models, np.float32), settings["epsilon"])


def ramplus_tl(inputs: Inputs, settings: Settings) -> PieceFunction:
    """As ram, with each model's unique changes enlarged by 1 + r * clip(shared / unique, 0, alpha), counted in this tensor."""
    unique, shared = np.zeros(inputs.num_models), np.zeros(inputs.num_models)
    for piece in inputs.pieces():
        masks = [np.abs(delta) > settings["epsilon"] for delta in piece.deltas]
        counts = _counts(masks)
        unique += [int(np.count_nonzero(mask & (counts == 1))) for mask in masks]
        shared += [int(np.count_nonzero(mask & (counts > 1))) for mask in masks]
    ratios = shared / np.maximum(unique, 1e-5)
    return _merged((1 + settings["r"] * np.clip(ratios, 0, settings["alpha"])).astype(np.float32), settings["epsilon"])


def _counts(masks: list[NDArray[np.bool_]]) -> NDArray[np.uint8]:
    counts = np.zeros(masks[0].shape, np.uint8)
    for mask in masks:
        counts += mask
    return counts


def _merged(factors: Array, epsilon: float) -> PieceFunction:
    def merge(piece: Piece) -> Array:
        masks = [np.abs(delta) > epsilon for delta in piece.deltas]
        counts = _counts(masks)
        share = np.float32(1) / np.maximum(counts, 1).astype(np.float32)
        change = np.zeros(piece.shape, np.float32)
        for delta, mask, factor in zip(piece.deltas, masks, factors, strict=True):
            change += delta * mask * np.where(counts == 1, factor, share)
        return on_base(piece, change)

    return merge
