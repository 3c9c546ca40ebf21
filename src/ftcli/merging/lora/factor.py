"""Low-rank algebra: sums of B @ A as one B @ A, exactly or as near as a rank allows, and dense changes as B @ A.

Energy is the sum of squared singular values, which is the squared Frobenius norm; the share that a rank keeps is reported.
Legend: ``m`` outputs, ``n`` inputs, ``r`` rank. Sources: Halko, Martinsson, Tropp 2011, arXiv:0909.4061 (randomised SVD).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftcli.errors import GateError
from ftcli.merging.numbers import Array

Wide = NDArray[np.float64]
EXACT_UP_TO = 768
"""Smaller side of a matrix up to which its SVD is computed in full; a larger one is sketched."""
POWER_ITERATIONS = 4
_OVERSAMPLING = 10
_FIRST_WIDTH = 32  # of a sketch that has to reach an energy; doubled until it does
_RANK_TOLERANCE = 1e-7
"""Singular values below this share of the largest are rounding of float32, and hold nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """A matrix as B @ A, and what of it is lost."""

    a: Array
    """``(r, n)``"""
    b: Array
    """``(m, r)``"""
    energy: float
    """Share of the matrix's energy that B @ A holds, 0..1; 1 for a matrix of zeros."""
    total: float
    """The matrix's energy."""

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


def joined(parts: Sequence[tuple[Array, Array]], scales: Sequence[float]) -> tuple[Array, Array]:
    """(A, B) of the exact sum of scale * B @ A: factors side by side, the scales in A; parts of scale 0 are left out.

    Args:
        parts: ``(r_i, n)`` A and ``(m, r_i)`` B of each.
    """
    kept = [(a, b, scale) for (a, b), scale in zip(parts, scales, strict=True) if scale != 0]
    if not kept:
        a, b = parts[0]
        return np.zeros_like(a[:1]), np.zeros_like(b[:, :1])
    rows = [a if scale == 1 else (a.astype(np.float64) * scale).astype(np.float32) for a, _, scale in kept]
    return np.concatenate(rows), np.concatenate([b for _, b, _ in kept], axis=1)


def truncated(a: Array, b: Array, rank: int | None, energy: float | None) -> Factored:
    """The nearest matrix of a lower rank to B @ A, without ever forming the product.

    QR of both sides leaves an (r, r) core whose SVD is that of the product.
    """
    _refuse_infinite(a, b)
    outer, core_b = np.linalg.qr(b.astype(np.float64))
    inner, core_a = np.linalg.qr(a.T.astype(np.float64))
    u, values, vt = np.linalg.svd(core_b @ core_a.T)
    count = chosen_rank(values, float(np.sum(values**2)), rank, energy)
    return _split(outer @ u[:, :count], values[:count], vt[:count] @ inner.T, float(np.sum(values**2)))


def factored(matrix: Array, rank: int | None, energy: float | None, seed: int = 0) -> Factored:
    """The nearest matrix of a lower rank; exact SVD for small matrices, else a sketch refined by power iterations.

    Args:
        matrix: ``(m, n)``.
        rank: largest rank; None for as many as the energy asks for.
        energy: smallest share of the energy to keep; None for as much as the rank holds.
        seed: of the sketch.
    """
    _refuse_infinite(matrix)
    total = float(np.sum(np.square(matrix, dtype=np.float64)))
    smaller = min(matrix.shape)
    limit = smaller if rank is None else min(rank, smaller)
    width = _FIRST_WIDTH if energy is not None and rank is None else limit
    while smaller > EXACT_UP_TO and width + _OVERSAMPLING < smaller // 2:
        u, values, vt = sketched_svd(matrix, width + _OVERSAMPLING, seed)
        values = values[:width]
        if width >= limit or float(np.sum(values**2)) >= (energy or 0) * total:
            break
        width *= 2
    else:
        u, values, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    count = chosen_rank(values, total, limit, energy)
    return _split(u[:, :count], values[:count], vt[:count], total)


def sketched_svd(matrix: Array, width: int, seed: int) -> tuple[Wide, Wide, Wide]:
    """The leading `width` singular triples, near enough after 4 power iterations.

    Products with the matrix are in float32, orthonormal bases in float64. Source: Halko et al. 2011, algorithms 4.4 and 5.1.
    """
    sketch = np.random.default_rng(seed).standard_normal((matrix.shape[1], width), np.float32)
    basis = _orthonormal(matrix @ sketch)
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    u, values, vt = np.linalg.svd((basis.T @ matrix).astype(np.float64), full_matrices=False)
    return basis.astype(np.float64) @ u, values, vt


def _refuse_infinite(*arrays: Array) -> None:
    """
    Raises:
        GateError: a number is NaN or infinite, and nothing can be factored.
    """
    if not all(np.isfinite(array).all() for array in arrays):
        raise GateError("a change of the weights is not finite, and has no factors", hint="smaller weights, or other adapters")


def chosen_rank(values: Wide, total: float, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep: at most `rank`, enough for `energy`, at least one, none that is rounding.

    Example:
        >>> chosen_rank(np.array([3.0, 2.0, 1.0]), 14.0, None, 0.9), chosen_rank(np.array([3.0, 2.0, 1.0]), 14.0, 2, 0.99)
        (2, 2)
    """
    if total == 0 or len(values) == 0:
        return 1
    count = int(np.count_nonzero(values > _RANK_TOLERANCE * values[0]))
    if energy is not None:
        kept = np.cumsum(values**2)
        count = min(count, int(np.searchsorted(kept, energy * total * (1 - 1e-12))) + 1)
    return max(1, count if rank is None else min(count, rank))


def _split(u: Wide, values: Wide, vt: Wide, total: float) -> Factored:
    """B = U sqrt(S), A = sqrt(S) V: both sides of one size, so that neither loses digits when it is stored."""
    root = np.sqrt(values)
    share = 1.0 if total == 0 else min(1.0, float(np.sum(values**2)) / total)
    return Factored(np.ascontiguousarray(root[:, None] * vt, np.float32), np.ascontiguousarray(u * root, np.float32), share, total)


def _orthonormal(matrix: NDArray[Any]) -> Array:
    return np.linalg.qr(matrix.astype(np.float64))[0].astype(np.float32)
