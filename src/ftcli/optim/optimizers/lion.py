"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.optim.optimizers.groups import Groups, with_peak_lr
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Lion(Spec):
    """Moves every weight by the learning rate, in the sign of its momentum; half of AdamW's state.

    Its updates are larger than AdamW's at the same `lr`: a third to a tenth of AdamW's is usual, with `weight_decay` as many
    times larger.

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    kind: Literal["lion"] = "lion"
    betas: tuple[float, float] = (0.9, 0.99)
    """Weight of the momentum in the update, and its decay, each in 0..1; a larger value remembers longer."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of a matrix's weights taken off per step, times the learning rate; vectors (biases, norms) never decay."""

    def build(self, groups: Groups, lr: float) -> Optimizer:
        """The optimizer; every group carries the `peak_lr` that the loop scales."""
        from ftcli.optim.rules.sign_momentum import SignMomentum

        return SignMomentum(with_peak_lr(groups, lr), lr=lr, betas=self.betas, weight_decay=self.weight_decay)
