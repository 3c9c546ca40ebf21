"""Muon for the hidden matrices, AdamW for everything else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftcli.optim.optimizers.groups import Groups, with_peak_lr
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer

_NOT_HIDDEN = re.compile(r"embed|wte|wpe|lm_head|(^|\.)(head|score|classifier|output_layer)\.")


class Muon(Spec):
    """Orthogonalised momentum for hidden matrices; embeddings, heads, vectors and stacked experts take AdamW.

    Muon's update is scaled to the size of AdamW's, so that one `lr` serves both.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; scale from Liu et al. 2025,
    arXiv:2502.16982, section 2.2.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Share of the momentum of a hidden matrix that is kept per step; a larger value smooths over more steps."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_steps: int = Field(default=5, ge=1, lt=100)
    """Newton-Schulz iterations; a larger value orthogonalises more exactly and costs three matrix products each."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's, for everything that is not a hidden matrix."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's, for everything that is not a hidden matrix."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Share of a matrix's weights taken off per step, times the learning rate; vectors (biases, norms) never decay."""

    def build(self, groups: Groups, lr: float) -> Optimizer:
        """One optimizer over both rules; every group carries the `peak_lr` that the loop scales."""
        from ftcli.optim.rules.muon_and_adamw import MuonAndAdamW

        muon_groups, adamw_groups = split_hidden(with_peak_lr(groups, lr))
        return MuonAndAdamW(
            muon_groups,
            adamw_groups,
            muon_settings={
                "lr": lr,
                "weight_decay": self.weight_decay,
                "momentum": self.momentum,
                "nesterov": self.nesterov,
                "ns_steps": self.ns_steps,
            },
            adamw_settings={"lr": lr, "weight_decay": self.weight_decay, "betas": self.betas, "eps": self.eps},
        )


def is_hidden_matrix(name: str, param: Any) -> bool:
    """Whether Muon may train it: a 2-D weight that is neither an embedding nor a head."""
    return param.ndim == 2 and _NOT_HIDDEN.search(name) is None


def split_hidden(groups: Groups) -> tuple[Groups, Groups]:
    """Each group cut in two: its hidden matrices, and the rest; empty halves are left out."""
    halves: tuple[Groups, Groups] = ([], [])
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        for hidden, half in zip((True, False), halves, strict=True):
            chosen = [(name, param) for name, param in pairs if is_hidden_matrix(name, param) is hidden]
            if chosen:
                half.append({**group, "names": [name for name, _ in chosen], "params": [param for _, param in chosen]})
    return halves
