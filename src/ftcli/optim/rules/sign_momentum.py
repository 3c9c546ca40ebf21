"""The update rule of Lion."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class SignMomentum(Optimizer):
    """Lion as a torch optimizer, one pass of foreach kernels per group.

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
        grads = [param.grad for param in params]
        momenta = [self.state[param]["exp_avg"] for param in params]
        beta_update, beta_momentum = group["betas"]
        # the update is taken before the momentum moves on: the two betas differ, so the order matters
        updates = torch._foreach_lerp(grads, momenta, beta_update)
        torch._foreach_sign_(updates)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, grads, 1 - beta_momentum)
