"""Trainable parameters as the groups of a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def parameter_groups(
    module: nn.Module, lr: float, weight_decay: float, lr_ratio: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """Groups by (learning rate, weight decay) of the trainable parameters, their names kept under `names`.

    Vectors and scalars (biases, norms, magnitudes) have no weight decay: pulling them to zero serves no purpose.

    Args:
        lr: peak learning rate.
        lr_ratio: factor on `lr` for the parameter of a name.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        key = (lr * lr_ratio(name), weight_decay if parameter.ndim > 1 else 0.0)
        group = groups.setdefault(key, {"params": [], "names": [], "lr": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
