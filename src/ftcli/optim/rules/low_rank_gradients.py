"""AdamW whose state of a matrix is kept in a low-rank image of the gradient: GaLore and APOLLO.

Legend: a gradient ``G`` has a short side of ``m`` and a long side of ``n`` entries; ``R`` of shape (r, n) is its image.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LowRankAndAdamW(Optimizer):
    """A low-rank rule for matrices and torch's AdamW for the rest, over the groups and the state of one optimizer.

    Args:
        matrix_groups: of 2-D parameters whose short side is longer than the rank; may be empty.
        adamw_groups: the rest; may be empty.
        settings: betas, eps and weight_decay, which both rules share.
        rank: of the images; None for a quarter of each matrix's short side.
        period: steps between two projections.
        scale: factor on the update of a matrix.
    """

    def __init__(
        self,
        matrix_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        settings: dict[str, Any],
        *,
        lr: float,
        rank: int | None,
        period: int,
        scale: float,
    ) -> None:
        self.rank, self.period, self.scale = rank, period, scale
        for rule, groups in (("low-rank", matrix_groups), ("adamw", adamw_groups)):
            for group in groups:
                group["rule"] = rule
        self._adamw = torch.optim.AdamW(adamw_groups, lr=lr, **settings) if adamw_groups else None
        super().__init__([*matrix_groups, *adamw_groups], {"lr": lr, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["rule"] == "low-rank":
                for name, param in zip(group["names"], group["params"], strict=True):
                    if param.grad is not None:
                        self._step_matrix(name, param, group)
        if self._adamw is not None:
            # linked anew at every step, because loading a state replaces both
            self._adamw.param_groups = [group for group in self.param_groups if group["rule"] == "adamw"]
            self._adamw.state = self.state
            self._adamw.step()
        return loss

    def _step_matrix(self, name: str, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        is_tall = param.shape[0] > param.shape[1]
        assert param.grad is not None
        gradient = param.grad.float().T if is_tall else param.grad.float()
        rank = rank_of(param, self.rank)
        if not state:
            state["step"] = 0
            state["exp_avg"] = gradient.new_zeros(rank, gradient.shape[1])
            state["exp_avg_sq"] = gradient.new_zeros(rank, gradient.shape[1])
        refreshes = state["step"] % self.period == 0
        state["step"] += 1
        image = self.image(gradient, state, name, rank, refreshes)
        update = self.update(gradient, image, _adam(image, state, group), state)
        if group["weight_decay"]:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_((update.T if is_tall else update).to(param.dtype), alpha=-group["lr"])

    @abstractmethod
    def image(self, gradient: Tensor, state: dict[str, Any], name: str, rank: int, refreshes: bool) -> Tensor:
        """(r, n) image of the (m, n) gradient, by a projection that is made anew where `refreshes` says so."""

    @abstractmethod
    def update(self, gradient: Tensor, image: Tensor, adapted: Tensor, state: dict[str, Any]) -> Tensor:
        """(m, n) direction from which the learning rate is taken, `adapted` being Adam's direction for the image."""


def _adam(image: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Adam's direction, with its two means moved on."""
    beta_mean, beta_square = group["betas"]
    state["exp_avg"].lerp_(image, 1 - beta_mean)
    state["exp_avg_sq"].mul_(beta_square).addcmul_(image, image, value=1 - beta_square)
    mean = state["exp_avg"] / (1 - beta_mean ** state["step"])
    root = (state["exp_avg_sq"] / (1 - beta_square ** state["step"])).sqrt_()
    direction: Tensor = mean / root.add_(group["eps"])
    return direction


def rank_of(param: Tensor, rank: int | None) -> int:
    """The rank of a matrix's state; the default is a quarter of its short side, at least 1."""
    return max(1, min(param.shape) // 4) if rank is None else rank


class GaLoreRule(LowRankAndAdamW):
    """Adam in the space of the gradient's largest left singular vectors, which are kept in the state.

    Source: Zhao et al. 2024, arXiv:2403.03507, algorithm 2.
    """

    def image(self, gradient: Tensor, state: dict[str, Any], name: str, rank: int, refreshes: bool) -> Tensor:
        """The gradient's coordinates in the singular vectors of the last refresh."""
        if refreshes:
            # of the (m, m) product, whose eigenvectors they are: m is the short side
            _, vectors = torch.linalg.eigh(gradient @ gradient.T)
            state["projection"] = vectors[:, -rank:].contiguous()
        projected: Tensor = state["projection"].T @ gradient
        return projected

    def update(self, gradient: Tensor, image: Tensor, adapted: Tensor, state: dict[str, Any]) -> Tensor:
        """Adam's direction, put back into the full space."""
        direction: Tensor = self.scale * (state["projection"] @ adapted)
        return direction


class ApolloRule(LowRankAndAdamW):
    """The gradient itself, scaled channel by channel by what Adam does to a random image of it.

    The random matrix is a function of the parameter's name and of the refresh, so that it needs no memory.

    Source: Zhu et al. 2024, arXiv:2412.05270, algorithm 1, and section 4.1 for the limit on the growth of the norm.
    """

    NORM_GROWTH = 1.01

    def image(self, gradient: Tensor, state: dict[str, Any], name: str, rank: int, refreshes: bool) -> Tensor:
        """A random projection of variance 1 / r, so that lengths are kept on average."""
        from ftcli.data.permutation import key_of

        refresh = (state["step"] - 1) // self.period
        generator = torch.Generator().manual_seed(key_of("apollo", name, refresh) >> 1)
        projection = torch.randn(rank, gradient.shape[0], generator=generator).to(gradient.device)
        return (projection / math.sqrt(rank)) @ gradient

    def update(self, gradient: Tensor, image: Tensor, adapted: Tensor, state: dict[str, Any]) -> Tensor:
        """The gradient scaled by channels (of a rank-1 image as a whole), its growth from step to step limited."""
        if len(image) == 1:
            factor = adapted.norm() / image.norm().clamp_min(1e-30)
        else:
            factor = adapted.norm(dim=0) / image.norm(dim=0).clamp_min(1e-30)
        direction: Tensor = self.scale * gradient * factor
        norm = direction.norm()
        before = state.get("norm", torch.zeros_like(norm))
        # A gradient of zero limits nothing: nothing could grow from it.
        limited = torch.where(before > 0, torch.minimum(norm, self.NORM_GROWTH * before), norm)
        state["norm"] = limited
        direction *= limited / norm.clamp_min(1e-30)
        return direction
