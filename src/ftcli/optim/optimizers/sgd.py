"""Stochastic gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ftcli.optim.optimizers.groups import Groups, with_peak_lr
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer


class SGD(Spec):
    """Gradient descent, with momentum if wanted; the only optimizer here whose updates are as large as the gradients.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Share of the last update that is kept in the next; a larger value smooths over more steps."""
    nesterov: bool = False
    """Look ahead along the momentum; needs `momentum` above 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Added to the gradient of a matrix, times the weights; vectors (biases, norms) never decay."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` needs `momentum` above 0")
        return self

    def build(self, groups: Groups, lr: float) -> Optimizer:
        """The torch optimizer; every group carries the `peak_lr` that the loop scales."""
        import torch

        return torch.optim.SGD(
            with_peak_lr(groups, lr), lr=lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
        )
