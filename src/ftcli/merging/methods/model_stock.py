"""Model Stock: as far from the base as the models agree. Source: Jang et al. 2024, arXiv:2403.19522."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.methods.sums import inner_products, on_base, row_inner_products, weighted_sum
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece, PieceFunction, Settings


def model_stock(inputs: Inputs, settings: Settings) -> PieceFunction:
    """base + t * (mean of the models - base), t = N c / (1 + (N - 1) c), c the mean cosine between two models' changes.

    t is kept in 0 to 1: models that pull apart give the base. A model that changes nothing has no angle, and counts as orthogonal.
    """
    num = inputs.num_models
    share = (1 / num,) * num
    if not settings["filter_wise"]:
        ratio = np.float32(interpolation(inner_products(inputs, deltas=True)[..., None])[0])
        return lambda piece: on_base(piece, weighted_sum(piece.deltas, share) * ratio)

    def merge(piece: Piece) -> Array:
        ratios = interpolation(row_inner_products(piece.deltas)).astype(np.float32)
        return on_base(piece, weighted_sum(piece.deltas, share) * ratios[:, None])

    return merge


def interpolation(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(groups,)`` interpolation ratios t.

    Args:
        products: ``(models, models, groups)`` inner products of the changes.
    """
    num = products.shape[0]
    norms = np.sqrt(np.einsum("iig->ig", products))
    total = np.zeros(products.shape[2])
    for i in range(num):
        for j in range(i):
            length = norms[i] * norms[j]
            total += np.divide(products[i, j], length, out=np.zeros_like(length), where=length > 0)
    cosine = np.clip(total / (num * (num - 1) / 2), -1.0, 1.0)
    cosine = np.maximum(cosine, 0.0)
    ratios: NDArray[np.float64] = num * cosine / (1 + (num - 1) * cosine)
    return ratios
