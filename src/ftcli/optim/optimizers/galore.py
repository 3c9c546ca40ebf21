"""GaLore: AdamW whose state lives in the space of the gradients' largest singular vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.optim.optimizers.groups import Groups, with_peak_lr
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer


class GaLore(Spec):
    """AdamW for hidden matrices in the space of the gradient's `rank` largest singular vectors; all else takes plain AdamW.

    For training every weight with little memory: of a matrix with sides m <= n the state holds 2 rn + rm numbers and not 2 mn.
    Every refresh costs an eigendecomposition of an m x m matrix.

    Source: Zhao et al. 2024, arXiv:2403.03507.
    """

    kind: Literal["galore"] = "galore"
    rank: int | None = Field(default=None, ge=1)
    """Singular vectors that are kept of each matrix's gradient; the default is a quarter of its short side. A larger value is nearer to
    AdamW and costs memory."""
    update_projection_every: int = Field(default=200, ge=1)
    """Steps between two choices of the singular vectors."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on the updates of hidden matrices: their learning rate over that of all else."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean of gradients and of their squares, each in 0..1; a larger value remembers longer."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square; a larger value damps the updates of weights with tiny gradients."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of a matrix's weights taken off per step, times the learning rate; vectors (biases, norms) never decay."""

    def build(self, groups: Groups, lr: float) -> Optimizer:
        """One optimizer over both rules; every group carries the `peak_lr` that the loop scales."""
        from ftcli.optim.optimizers.low_rank_groups import split_low_rank
        from ftcli.optim.rules.low_rank_gradients import GaLoreRule

        settings = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        matrices, others = split_low_rank(with_peak_lr(groups, lr), self.rank)
        return GaLoreRule(matrices, others, settings, lr=lr, rank=self.rank, period=self.update_projection_every, scale=self.scale)
