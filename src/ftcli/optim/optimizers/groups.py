"""Parameter groups as every optimizer takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Groups = list[dict[str, Any]]


def with_peak_lr(groups: Iterable[Mapping[str, Any]], lr: float) -> Groups:
    """Copies of `groups`, each with its `lr` and, next to it, the `peak_lr` that the loop scales at every step.

    Args:
        groups: each has "params" and "names"; its own "lr" wins over `lr`, its own "weight_decay" over the optimizer's.
        lr: peak learning rate of the groups that have none.
    """
    built = []
    for group in groups:
        peak_lr = group.get("lr", lr)
        built.append({**group, "params": list(group["params"]), "lr": peak_lr, "peak_lr": peak_lr})
    return built
