"""Means on the sphere: slerp, nuslerp, karcher, and multislerp.

Every mean here lies in the span of its inputs. So all angles, and the iterations of the Karcher mean, are computed on the small matrix
of inner products, in float64; the tensors are read once for it and once more for the one weighted sum.
Sources: Shoemake 1985 (slerp); Karcher 1977, Afsari 2011 (the mean, its existence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ftcli.errors import GateError, Problem
from ftcli.merging.methods.method import NoMean
from ftcli.merging.methods.sums import inner_products, normalised, row_inner_products, weighted_sum
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece, PieceFunction, Settings

STRAIGHT = 1e-8
"""Sine of an angle below which the arc is its chord, to more digits than float32 has."""
_ROUNDS, _STILL = 200, 1e-13


def slerp(inputs: Inputs, settings: Settings) -> PieceFunction:
    """The point at `t` of the arc from the base to the model, both taken as one long vector."""
    t = settings["t"]
    products = np.zeros((2, 2))
    for piece in inputs.pieces():
        products += _pair_products(piece)
    first, second = arc_weights(products, t, inputs.randomness.tensor)

    def merge(piece: Piece) -> Array:
        assert piece.base is not None
        return weighted_sum((piece.base, piece.models[0]), (first, second))

    return merge


def _pair_products(piece: Piece) -> NDArray[np.float64]:
    from ftcli.merging.methods.sums import piece_inner_products

    assert piece.base is not None
    return piece_inner_products((piece.base, piece.models[0]))


def arc_weights(products: NDArray[np.float64], t: float, tensor: str = "") -> tuple[float, float]:
    """What the point at `t` of the arc from a to b is in a and b.

    Args:
        products: ``(2, 2)`` inner products of a and b.

    Raises:
        NoMean: a and b are opposite, and no arc between them is the shortest.
    """
    if t in (0, 1):
        return 1.0 - t, float(t)
    norms = math.sqrt(products[0, 0]), math.sqrt(products[1, 1])
    if not all(norms):
        return 1 - t, t
    cosine = products[0, 1] / (norms[0] * norms[1])
    sine = math.sqrt(max(0.0, 1 - min(1.0, cosine * cosine)))
    if sine < 1e-6 and cosine < 0:
        raise NoMean(f"tensor `{tensor}`: the two models are opposite, so that no arc between them is the shortest", hint="use linear")
    if sine < STRAIGHT:
        return 1 - t, t
    angle = math.atan2(sine, cosine)
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def nuslerp(inputs: Inputs, settings: Settings) -> PieceFunction:
    """slerp at t = w2 / (w1 + w2), of the models or, with a base, of what they change of it; whole, by row, or by column.

    A tensor of one row is a vector, and taken whole: its columns are single numbers, between which there is no arc.
    """
    t = normalised(settings["weight"])[1]
    with_base = next(iter(inputs.pieces())).base is not None
    tensor = inputs.randomness.tensor
    if settings["nuslerp_flatten"] or inputs.shape[0] == 1:
        first, second = arc_weights(inner_products(inputs, deltas=with_base), t, tensor)

        def merge(piece: Piece) -> Array:
            return _placed(piece, weighted_sum(piece.deltas if with_base else piece.models, (first, second)), with_base)

        return merge
    if settings["nuslerp_row_wise"]:
        columns = _column_products(inputs, with_base)
        weights = _arc_weights_of_each(columns, t, tensor)
        return lambda piece: _placed(piece, _mixed(piece.deltas if with_base else piece.models, weights), with_base)

    def merge_rows(piece: Piece) -> Array:
        parts = piece.deltas if with_base else piece.models
        pair = _arc_weights_of_each(row_inner_products(parts), t, tensor)
        return _placed(piece, _mixed(parts, (pair[0][:, None], pair[1][:, None])), with_base)

    return merge_rows


def _placed(piece: Piece, mixed: Array, with_base: bool) -> Array:
    return piece.base + mixed if with_base and piece.base is not None else mixed


def _mixed(parts: Sequence[Array], weights: Sequence[NDArray[np.float32]]) -> Array:
    return parts[0] * weights[0] + parts[1] * weights[1]


def _column_products(inputs: Inputs, with_base: bool) -> NDArray[np.float64]:
    """``(2, 2, columns)`` inner products."""
    total = np.zeros((2, 2, inputs.shape[1]))
    for piece in inputs.pieces():
        parts = [part.astype(np.float64) for part in (piece.deltas if with_base else piece.models)]
        for i in range(2):
            for j in range(2):
                total[i, j] += np.einsum("rc,rc->c", parts[i], parts[j])
    return total


def _arc_weights_of_each(products: NDArray[np.float64], t: float, tensor: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`arc_weights` of many pairs at once.

    Args:
        products: ``(2, 2, pairs)``.
    """
    norms = np.sqrt(products[0, 0] * products[1, 1])
    cosine = np.divide(products[0, 1], norms, out=np.ones_like(norms), where=norms > 0)
    sine = np.sqrt(np.maximum(0.0, 1 - np.minimum(1.0, cosine * cosine)))
    if t not in (0, 1) and bool(((sine < 1e-6) & (cosine < 0)).any()):
        raise NoMean(f"tensor `{tensor}`: two rows or columns are opposite, so that no arc between them is the shortest")
    angle = np.arctan2(sine, cosine)
    is_arc = sine >= STRAIGHT
    safe = np.where(is_arc, sine, 1.0)
    first = np.where(is_arc, np.sin((1 - t) * angle) / safe, 1 - t)
    second = np.where(is_arc, np.sin(t * angle) / safe, t)
    return first.astype(np.float32), second.astype(np.float32)


def karcher(inputs: Inputs, settings: Settings) -> PieceFunction:
    """The weighted Karcher mean of the directions, times the weighted mean of the lengths; for two models it is slerp at w2."""
    weights = normalised(settings["weight"])
    products = _finite(inner_products(inputs, deltas=False), inputs)
    coefficients = karcher_weights(products, weights, settings["max_iter"], inputs.randomness.tensor)
    return lambda piece: weighted_sum(piece.models, coefficients)


def _finite(products: NDArray[np.float64], inputs: Inputs) -> NDArray[np.float64]:
    """The inner products, of models whose numbers are finite.

    Raises:
        GateError: one's are not; no direction can be told.
    """
    if np.isfinite(products).all():
        return products
    names = [name for name, own in zip(inputs.randomness.models, np.diag(products), strict=False) if not math.isfinite(own)]
    what = f"values are NaN or infinite ({', '.join(f'`{name}`' for name in names) or 'a model'} has them already)"
    raise GateError("the merge is not finite", [Problem(inputs.randomness.tensor, what, "nothing was written")])


def karcher_weights(products: NDArray[np.float64], weights: Sequence[float], rounds: int | None = None, tensor: str = "") -> list[float]:
    """What the weighted Karcher mean is in its inputs, in which it is linear once the angles are known.

    Args:
        products: ``(n, n)`` inner products of the inputs.
        weights: ``(n,)``, not negative, of sum 1.
        rounds: at most so many iterations; None is as many as it takes.

    Returns:
        ``(n,)`` coefficients.

    Raises:
        NoMean: the inputs cancel, and have no mean direction.
    """
    norms = np.sqrt(np.diag(products))
    size = float(np.dot(weights, norms))
    w = np.where(norms > 0, np.asarray(weights, np.float64), 0.0)
    if 1.0 in weights or not w.any():
        return [float(weight) for weight in weights]
    w /= w.sum()  # zeros have no direction; they count in the length alone
    scale = np.where(norms > 0, norms, 1.0)
    cosines = products / np.outer(scale, scale)
    mean = w.copy()  # coefficients of the unit vectors
    length = math.sqrt(max(0.0, float(mean @ cosines @ mean)))
    if length < 1e-6:
        raise NoMean(f"tensor `{tensor}`: the models cancel, and have no mean direction", hint="use linear, or other weights")
    mean = np.asarray(mean / length, np.float64)
    for _ in range(_ROUNDS if rounds is None else rounds):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        if bool((dots[w > 0] < -1 + 1e-9).any()):
            raise NoMean(f"tensor `{tensor}`: a model is opposite to the mean, so that no direction leads to it", hint="use linear")
        angles = np.arccos(dots)
        ratio = np.where(angles > 1e-7, angles / np.maximum(np.sin(angles), 1e-300), 1.0)
        tangent = w * ratio - (w * ratio * dots).sum() * mean
        step = math.sqrt(max(0.0, float(tangent @ cosines @ tangent)))
        if step < _STILL:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / math.sqrt(float(mean @ cosines @ mean))
    return [float(c) for c in mean / scale * size]


def multislerp(inputs: Inputs, settings: Settings) -> PieceFunction:
    """The weighted sum of the directions brought to unit length, times the weighted sum of the lengths; with a base, of the changes.

    This is what mergekit's multislerp computes: its tangent step is zero. Prefer karcher, which is slerp for two models.
    """
    weights = normalised(settings["weight"]) if settings["normalize_weights"] else settings["weight"]
    with_base = next(iter(inputs.pieces())).base is not None
    products = _finite(inner_products(inputs, deltas=with_base), inputs)
    norms = np.sqrt(np.diag(products))
    scale = np.where(norms > 0, norms, 1.0)
    units = np.where(norms > 0, np.asarray(weights), 0.0) / scale
    length = math.sqrt(max(0.0, float(units @ products @ units)))
    if length < 1e-6 and norms.any():
        raise NoMean(f"tensor `{inputs.randomness.tensor}`: the models cancel, and have no mean direction", hint="use linear")
    factor = float((np.asarray(weights) * norms).sum()) / length if length else 0.0
    coefficients = [float(unit) * factor for unit in units]
    return lambda piece: _placed(piece, weighted_sum(piece.deltas if with_base else piece.models, coefficients), with_base)
