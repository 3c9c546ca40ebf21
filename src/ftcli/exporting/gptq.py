"""Weights as small integers, chosen so that what a layer computes changes little: GPTQ.

Column by column, what rounding changes in the layer's outputs is made good by the columns that are not rounded yet. Columns with large
inputs come first; each belongs to the group of its place, so nothing has to be put in order again when the layer runs.

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DAMPING = 0.01  # of the mean square of the inputs, added to each: inputs seen rarely are not trusted to be 0
_COLUMNS = 128  # rounded before the columns behind them are told
_SMALLEST_SCALE = 1e-7  # of float16 above 0: groups of zeros are divided by it
_SHRUNK = [1.0 - 0.02 * step for step in range(20)]  # shares of a group's largest weight that its largest integer may stand for


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight as integers times scales."""

    integers: Tensor
    """``(out, in)`` int8, from ``-2^(bits - 1)`` to ``2^(bits - 1) - 1``."""
    scales: Tensor
    """``(out, in / group)``, one for each group of neighbouring columns."""

    def weight(self) -> Tensor:
        """``(out, in)`` what is computed with, in the dtype of the scales."""
        scales = self.scales.unsqueeze(-1)
        found: Tensor = (self.integers.to(scales.dtype).unflatten(1, (self.scales.shape[1], -1)) * scales).flatten(1)
        return found


def rounded(weight: Tensor, gram: Tensor, bits: int, group: int, dtype: torch.dtype) -> Rounded:
    """The weight by GPTQ.

    Args:
        weight: ``(out, in)``; `in` is a multiple of `group`.
        gram: ``(in, in)`` sum of x x^T over the layer's inputs.
        dtype: of the scales.
    """
    import torch

    weight, squares = weight.float().clone(), gram.diagonal().clone()
    # columns seen rarely count, too: what is large in them may come later
    scales = group_scales(weight, squares + squares.mean(), bits, group, dtype)
    order = squares.argsort(descending=True)
    factor = _inverse_factor(gram[order][:, order])
    weight, by_column = weight[:, order], scales.float().repeat_interleave(group, dim=1)[:, order]
    integers = torch.empty_like(weight)
    for start in range(0, weight.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, weight.shape[1])
        errors = torch.empty_like(weight[:, start:end])
        for column in range(start, end):
            integers[:, column] = nearest(weight[:, column], by_column[:, column], bits)
            error = (weight[:, column] - integers[:, column] * by_column[:, column]) / factor[column, column]
            weight[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return Rounded(integers[:, order.argsort()].to(torch.int8), scales)


def rounded_to_nearest(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> Rounded:
    """The weight, each number by itself: what GPTQ is measured against."""
    import torch

    scales = group_scales(weight.float(), torch.ones(weight.shape[1], device=weight.device), bits, group, dtype)
    return Rounded(nearest(weight.float(), scales.float().repeat_interleave(group, dim=1), bits).to(torch.int8), scales)


def nearest(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The integers nearest to `values` in units of `scales`."""
    found: Tensor = (values / scales).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return found


def group_scales(weight: Tensor, squares: Tensor, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """``(out, in / group)`` for each group the scale with the least squared error, columns weighted by `squares`."""
    import torch

    groups, importance = weight.unflatten(1, (-1, group)), squares.clamp(min=1e-12).unflatten(0, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    best, least = largest.to(dtype), largest.new_full(largest.shape, torch.inf)
    for share in _SHRUNK:
        scales = (largest * share).to(dtype).clamp(min=_SMALLEST_SCALE)
        error = ((groups - nearest(groups, scales.float(), bits) * scales.float()) ** 2 * importance).sum(-1, keepdim=True)
        best, least = scales.where(error < least, best), error.minimum(least)
    found: Tensor = best.squeeze(-1)
    return found


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """Squared change of what the layer computes, as a share of what it computes, over the inputs behind `gram`."""
    change = (weight - other).float()
    whole = float(((weight.float() @ gram) * weight.float()).sum())
    return float(((change @ gram) * change).sum()) / max(whole, 1e-30)


def _inverse_factor(gram: Tensor) -> Tensor:
    """``(in, in)`` upper triangular U with U^T U the inverse of `gram`, damped until it has one."""
    import torch

    gram = gram.clone()
    gram.diagonal()[gram.diagonal() == 0] = 1.0  # of inputs that never came: such columns are rounded by themselves
    damping = DAMPING * float(gram.diagonal().mean())
    while True:
        gram.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
