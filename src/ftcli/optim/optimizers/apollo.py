"""APOLLO: the gradient, scaled by what Adam does to a random low-rank image of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.optim.optimizers.groups import Groups, with_peak_lr
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer

MINI_SCALE = 128.0**0.5


class Apollo(Spec):
    """SGD with Adam's step sizes, learnt on a random image of the gradient; matrices outside the hidden layers take plain AdamW.

    For training every weight with little memory and no decomposition: of a matrix with sides m <= n the state holds 2 rn numbers and
    not 2 mn. `rank: 1` is APOLLO-Mini: one step size a matrix, and a state as good as none.

    Source: Zhu et al. 2024, arXiv:2412.05270.
    """

    kind: Literal["apollo"] = "apollo"
    rank: int | None = Field(default=None, ge=1)
    """Rows of the random image; the default is a quarter of each matrix's short side, 1 is APOLLO-Mini."""
    update_projection_every: int = Field(default=200, ge=1)
    """Steps between two random projections."""
    scale: float | None = Field(default=None, gt=0)
    """Factor on the updates of hidden matrices; the default is 1, and the root of 128 at rank 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean of gradients and of their squares, each in 0..1; a larger value remembers longer."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square; a larger value damps the updates of weights with tiny gradients."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of a matrix's weights taken off per step, times the learning rate; vectors (biases, norms) never decay."""

    def build(self, groups: Groups, lr: float) -> Optimizer:
        """One optimizer over both rules; every group carries the `peak_lr` that the loop scales."""
        from ftcli.optim.optimizers.low_rank_groups import split_low_rank
        from ftcli.optim.rules.low_rank_gradients import ApolloRule

        settings = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        scale = self.scale if self.scale is not None else MINI_SCALE if self.rank == 1 else 1.0
        matrices, others = split_low_rank(with_peak_lr(groups, lr), self.rank)
        return ApolloRule(matrices, others, settings, lr=lr, rank=self.rank, period=self.update_projection_every, scale=scale)
