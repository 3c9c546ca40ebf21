"""Two update rules behind one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class MuonAndAdamW(Optimizer):
    """torch's Muon and AdamW over the groups and the state of one optimizer.

    Args:
        muon_groups: of 2-D parameters only; may be empty.
        adamw_groups: the rest; may be empty.
        muon_settings, adamw_settings: what torch's two optimizers are made with.
    """

    def __init__(
        self,
        muon_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        muon_settings: dict[str, Any],
        adamw_settings: dict[str, Any],
    ) -> None:
        for rule, groups in (("muon", muon_groups), ("adamw", adamw_groups)):
            for group in groups:
                group["rule"] = rule
        self._rules: dict[str, Optimizer] = {}
        if muon_groups:
            self._rules["muon"] = torch.optim.Muon(muon_groups, **muon_settings, adjust_lr_fn="match_rms_adamw")
        if adamw_groups:
            self._rules["adamw"] = torch.optim.AdamW(adamw_groups, **adamw_settings)
        super().__init__([*muon_groups, *adamw_groups], {"lr": muon_settings["lr"]})

    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, optimizer in self._rules.items():
            # linked anew at every step, because loading a state replaces both
            optimizer.param_groups = [group for group in self.param_groups if group["rule"] == rule]
            optimizer.state = self.state
            optimizer.step()
        return loss
