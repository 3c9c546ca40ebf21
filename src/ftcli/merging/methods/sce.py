"""SCE: select by variance, calculate weights from energy, erase minority signs. Source: Wan et al. 2024, arXiv:2408.07990."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.methods.sums import on_base, weighted_sum
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece, PieceFunction, Settings
from ftcli.merging.selection import Largest, largest


def sce(inputs: Inputs, settings: Settings) -> PieceFunction:
    """The mean of the changes weighted by their mean square, over the `select_topk` positions where models differ most."""
    chosen = _selected(inputs, settings["select_topk"])
    energy = np.zeros(inputs.num_models)
    for piece in inputs.pieces():
        energy += [float(np.square(change, dtype=np.float64).sum()) for change in _changes(piece, chosen)]
    total = energy.sum()
    weights = np.full(inputs.num_models, 1 / inputs.num_models) if total == 0 else energy / total

    def merge(piece: Piece) -> Array:
        changes = _changes(piece, chosen)
        sign = np.sign(weighted_sum(changes, (1,) * len(changes)))
        mixed, divisor = np.zeros_like(sign), np.zeros_like(sign)
        for change, weight in zip(changes, weights, strict=True):
            agrees = change * sign > 0
            mixed += change * agrees * np.float32(weight)
            divisor += agrees * np.float32(weight)
        divisor[divisor == 0] = 1
        mixed /= divisor
        return on_base(piece, mixed)

    return merge


def _selected(inputs: Inputs, share: float) -> Largest | None:
    """The positions to merge; None is all, as where the models nowhere differ."""
    if share >= 1:
        return None
    num_different = sum(int(np.count_nonzero(_variance(piece))) for piece in inputs.pieces())
    if num_different == 0:
        return None
    return largest(inputs, [(_variance, [int(share * num_different)])])[0][0]


def _variance(piece: Piece) -> Array:
    """``(rows, columns)`` variance over the models."""
    mean = weighted_sum(piece.deltas, (1 / len(piece.deltas),) * len(piece.deltas))
    total = np.zeros_like(mean)
    for delta in piece.deltas:
        total += np.square(delta - mean)
    return total / np.float32(len(piece.deltas))


def _changes(piece: Piece, chosen: Largest | None) -> list[Array]:
    if chosen is None:
        return list(piece.deltas)
    mask: NDArray[np.bool_] = chosen.mask(_variance(piece), piece.index)
    return [delta * mask for delta in piece.deltas]
