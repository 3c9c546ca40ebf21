"""A quadratic pull of weights towards a value: ½ Σ s (θ - θ₀)², each weight with a strength s of its own, or all with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel


@dataclass(frozen=True, slots=True, eq=False)
class Pulled:
    """One parameter, where it is drawn to, and how much."""

    name: str
    parameter: nn.Parameter
    towards: Tensor | None
    """None for zero."""
    weight: float
    importance: Tensor | None = None
    """Of each number; None where all count alike."""

    def distance(self) -> Tensor:
        """θ - θ₀ in float32 or better."""
        value = self.parameter.detach()
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        return value.clone() if self.towards is None else value - self.towards


def _half_square(pulled: Pulled) -> Tensor:
    squares = pulled.distance().square_()
    if pulled.importance is not None:
        squares *= pulled.importance
    return (0.5 * pulled.weight) * squares.sum()


class _HalfSquare(torch.autograd.Function):
    """½ Σ s d² of one parameter; nothing of its size is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, pulled: Pulled) -> Tensor:
        ctx.pulled = pulled
        return _half_square(pulled)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        pulled: Pulled = ctx.pulled
        gradient = pulled.distance().mul_(upstream * pulled.weight)
        if pulled.importance is not None:
            gradient *= pulled.importance
        return gradient.to(pulled.parameter.dtype), None


class Pull:
    """The pull as a part of the loss."""

    reads_hidden = False
    is_decoupled = False

    def __init__(self, name: str, pulled: Sequence[Pulled]) -> None:
        self.name, self.pulled = name, pulled

    def loss_sum(self, model: TreeModel, batch: Batch, hidden: Tensor) -> Tensor:
        """The penalty times the batch's weight, so that a step's mean holds it once."""
        values: list[Tensor] = [_HalfSquare.apply(item.parameter, item) for item in self.pulled]  # type: ignore[no-untyped-call]
        return torch.stack([value.float() for value in values]).sum() * batch.total_weight

    def decoupled_loss(self) -> Tensor | None:
        """None: it is in the loss."""
        return None

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: the gradient has done it."""


class DecoupledPull(Pull):
    """The pull after the update: θ moves lr x weight of the way, never beyond where it is drawn to."""

    is_decoupled = True

    @torch.no_grad()
    def decoupled_loss(self) -> Tensor:
        """The penalty at the weights that a step begins with, as the loss is measured."""
        values = [_half_square(item).float() for item in self.pulled]
        return torch.stack(values).sum()

    @torch.no_grad()
    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Move; resting parameters stay where they are."""
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for item in self.pulled:
            if getattr(item.parameter, "is_resting", False):
                continue
            share = min(1.0, float(rates[id(item.parameter)]) * item.weight)
            end = torch.zeros_like(item.parameter) if item.towards is None else item.towards
            item.parameter.lerp_(end.to(item.parameter.dtype), share)
