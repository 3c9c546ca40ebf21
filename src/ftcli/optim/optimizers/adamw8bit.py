"""AdamW with its state kept in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.optim.optimizers.groups import Groups, with_peak_lr
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer


class AdamW8bit(Spec):
    """AdamW with block-wise 8-bit state: about 2 bytes per trained weight instead of 8.

    Tensors of fewer than 4096 weights keep 32-bit state. Runs on CUDA and on CPU.

    Source: Dettmers et al. 2021, arXiv:2110.02861; bitsandbytes.
    """

    kind: Literal["adamw-8bit"] = "adamw-8bit"
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean of gradients and of their squares, each in 0..1; a larger value remembers longer."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square; a larger value damps the updates of weights with tiny gradients."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of a matrix's weights taken off per step, times the learning rate; vectors (biases, norms) never decay."""

    def build(self, groups: Groups, lr: float) -> Optimizer:
        """The bitsandbytes optimizer; every group carries the `peak_lr` that the loop scales."""
        import bitsandbytes

        optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(
            with_peak_lr(groups, lr), lr=lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        return optimizer
