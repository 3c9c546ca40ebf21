"""Which parameters a low-rank rule takes: hidden matrices whose short side is longer than the rank."""

from __future__ import annotations

from typing import Any

from ftcli.optim.optimizers.groups import Groups
from ftcli.optim.optimizers.muon import is_hidden_matrix


def split_low_rank(groups: Groups, rank: int | None) -> tuple[Groups, Groups]:
    """Each group cut in two: the matrices that gain from a state of `rank`, and the rest; empty halves are left out."""
    halves: tuple[Groups, Groups] = ([], [])
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        for wanted, half in zip((True, False), halves, strict=True):
            chosen = [(name, param) for name, param in pairs if _gains(name, param, rank) is wanted]
            if chosen:
                half.append({**group, "names": [name for name, _ in chosen], "params": [param for _, param in chosen]})
    return halves


def _gains(name: str, param: Any, rank: int | None) -> bool:
    return is_hidden_matrix(name, param) and min(param.shape) > (1 if rank is None else rank)
