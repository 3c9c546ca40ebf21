"""Where the low-rank factors start: from the weight, from the data, or from the quantisation error.

Every function gives ``A (r, in)`` and ``B (out, r)`` in float32 for a weight ``W (out, in)`` and the scaling s of ``W + s * B @ A``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

# Above this size a randomised decomposition replaces the full one, which would take minutes a matrix.
_FULL_SVD_MAX = 1024
_OVERSAMPLING = 16
_POWER_ITERATIONS = 8


def pissa_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The principal part of the weight: s * B @ A is its best approximation of this rank.

    Source: Meng et al. 2024, arXiv:2404.02948, equations 2-3; the randomised decomposition is its section 4.
    """
    left, values, right = _leading_svd(weight.float(), rank)
    root = (values / scaling).sqrt()
    return root[:, None] * right, left * root


def olora_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R of the weight's QR decomposition: an orthonormal B.

    Source: Büyükakyüz 2024, arXiv:2406.01775, algorithm 1.
    """
    orthonormal, upper = torch.linalg.qr(weight.float())
    return upper[:rank].contiguous(), orthonormal[:, :rank].contiguous()


def loftq_factors(weight: Tensor, stored: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The best correction of this rank of what quantisation lost: s * B @ A approximates W - dequantised W.

    One round of the alternation, so that the stored weight stays the plain quantisation of W, which every loader makes.

    Source: Li et al. 2023, arXiv:2310.08659, equation 5 with T = 1 and the quantised weight first.
    """
    return pissa_factors(weight.float() - stored.float(), rank, scaling)


def eva_factors(directions: Tensor, out_features: int, rank: int) -> tuple[Tensor, Tensor]:
    """A holds the directions in which the layer's inputs vary most, B is zero.

    Source: Paischer et al. 2024, arXiv:2410.07170, section 3.1, with the same rank for every layer of a pattern (rho = 1).
    """
    return directions[:rank].float().contiguous(), torch.zeros(out_features, rank)


def input_directions(
    model: nn.Module, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], batches: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """(rank, in) right singular vectors of the inputs each layer gets on the batches, padding left out.

    The decomposition is updated batch by batch: of the rows seen so far only the leading directions, times their singular
    values, are kept and stacked on the next batch's rows.

    Args:
        layers: the layers to watch, by name.
        ranks: directions to keep of each.
        batches: `input_ids` and `attention_mask`, each (B, L).
    """
    device = next(model.parameters()).device
    sketches: dict[str, Tensor] = {}
    mask = torch.empty(0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])[mask.reshape(-1)].float()
            stacked = torch.cat([sketches[name], rows]) if name in sketches else rows
            _, values, right = torch.linalg.svd(stacked, full_matrices=False)
            sketches[name] = (values[:, None] * right)[: ranks[name]]

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch["attention_mask"].bool().to(device)
                model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: torch.nn.functional.normalize(sketch, dim=1) for name, sketch in sketches.items()}


def _leading_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, r), (r,), (r, in) leading singular vectors and values."""
    if min(weight.shape) <= _FULL_SVD_MAX:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, q=min(rank + _OVERSAMPLING, *weight.shape), niter=_POWER_ITERATIONS)
        right = right.T
    return left[:, :rank], values[:rank], right[:rank]
