"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.optim.optimizers.groups import Groups, with_peak_lr
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer

_FUSED_DEVICES = {"cpu", "cuda", "xpu"}


class AdamW(Spec):
    """Adam with decoupled weight decay, in one fused kernel where the device has one.

    Source: Kingma and Ba 2014, arXiv:1412.6980; Loshchilov and Hutter 2017, arXiv:1711.05101.
    """

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean of gradients and of their squares, each in 0..1; a larger value remembers longer."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square; a larger value damps the updates of weights with tiny gradients."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of a matrix's weights taken off per step, times the learning rate; vectors (biases, norms) never decay."""

    def build(self, groups: Groups, lr: float) -> Optimizer:
        """The torch optimizer; every group carries the `peak_lr` that the loop scales."""
        import torch

        built = with_peak_lr(groups, lr)
        params = [param for group in built for param in group["params"]]
        fused = all(param.device.type in _FUSED_DEVICES and param.is_floating_point() for param in params)
        return torch.optim.AdamW(built, lr=lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused or None)
