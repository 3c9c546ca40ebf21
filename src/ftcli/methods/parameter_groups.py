"""Trained parameters: which they are, and as the groups of a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def rest(parameter: nn.Parameter, is_resting: bool) -> None:
    """Let a trained parameter get no gradient until it is called up again; it stays one of the run's trained parameters."""
    parameter.requires_grad_(not is_resting)
    parameter.is_resting = is_resting  # type: ignore[attr-defined]


def trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that this run trains, by name, those at rest in this step with them."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or getattr(parameter, "is_resting", False):
            yield name, parameter


def parameter_groups(
    module: nn.Module, lr: float, weight_decay: float, lr_ratio: Callable[[str], float] = lambda name: 1.0
) -> list[dict[str, Any]]:
    """Groups by (learning rate, weight decay) of the trained parameters, their names kept under `names`.

    Vectors and scalars (biases, norms, magnitudes) have no weight decay: pulling them to zero serves no purpose.

    Args:
        lr: peak learning rate.
        lr_ratio: factor on `lr` for the parameter of a name.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trained_parameters(module):
        key = (lr * lr_ratio(name), weight_decay if parameter.ndim > 1 else 0.0)
        group = groups.setdefault(key, {"params": [], "names": [], "lr": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
