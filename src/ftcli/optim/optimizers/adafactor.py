"""Adafactor: Adam's second moment kept as one row and one column per matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.optim.optimizers.groups import Groups, with_peak_lr
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Adafactor(Spec):
    """Adam without momentum and with a factored second moment: next to no optimizer memory.

    transformers' version with the learning rate as written. torch's own multiplies it by each matrix's root mean square, which
    all but freezes a matrix that starts at zero, as the second factor of LoRA does.

    Source: Shazeer and Stern 2018, arXiv:1804.04235, without relative step sizes (section 8).
    """

    kind: Literal["adafactor"] = "adafactor"
    decay_rate: float = Field(default=-0.8, lt=0)
    """The second moment remembers 1 - step ** decay_rate of itself; a value nearer 0 forgets faster."""
    clip_threshold: float = Field(default=1.0, gt=0)
    """Root mean square to which the update of each tensor is clipped; a larger value clips less."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of a matrix's weights taken off per step, times the learning rate; vectors (biases, norms) never decay."""

    def build(self, groups: Groups, lr: float) -> Optimizer:
        """The transformers optimizer; every group carries the `peak_lr` that the loop scales."""
        from transformers.optimization import Adafactor as TransformersAdafactor

        return TransformersAdafactor(
            with_peak_lr(groups, lr),
            lr=lr,
            decay_rate=self.decay_rate,
            clip_threshold=self.clip_threshold,
            weight_decay=self.weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
