"""Methods of two models that look at where they differ: nearswap and arcee_fusion."""

from __future__ import annotations

import numpy as np

from ftcli.merging.methods.sums import on_base
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import Inputs, Piece, PieceFunction, Settings
from ftcli.merging.selection import largest


def nearswap(inputs: Inputs, settings: Settings) -> PieceFunction:
    """The base moved towards the model by at most `t` in every weight. Source: alchemonaut, QuartetAnemoi-70B-t0.0001."""
    t = np.float32(settings["t"])

    return lambda piece: on_base(piece, np.clip(piece.deltas[0], -t, t))


def arcee_fusion(inputs: Inputs, settings: Settings) -> PieceFunction:
    """The changes whose importance is at least median + 1.5 interquartile ranges; importance is |change| times the KL divergence of the
    row's softmax from the base's. Quantiles are exact. Source: arcee-ai, mergekit's documentation of the method.
    """
    rows, columns = inputs.shape
    size = rows * columns
    # the value at position floor(q * (n - 1)) from below is the (n - position)-th from above
    (quantiles,) = largest(inputs, [(_importance, [size - int(q * (size - 1)) for q in (0.25, 0.5, 0.75)])])
    first, median, third = (_value(inputs, found.threshold) for found in quantiles)
    threshold = np.float32(median + np.float32(1.5) * (third - first))
    return lambda piece: on_base(piece, piece.deltas[0] * (_importance(piece) >= threshold))


def _value(inputs: Inputs, threshold: np.float32) -> np.float32:
    """A threshold that stands for "all" is the smallest value."""
    return threshold if threshold >= 0 else np.float32(min(float(_importance(piece).min()) for piece in inputs.pieces()))


def _importance(piece: Piece) -> Array:
    assert piece.base is not None
    eps = np.float32(1e-8)
    p, q = _softmax(piece.models[0]) + eps, _softmax(piece.base) + eps
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    importance: Array = np.abs(piece.deltas[0]) * divergence
    return np.maximum(importance, np.float32(0))


def _softmax(values: Array) -> Array:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares
