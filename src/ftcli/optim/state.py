"""The state of an optimizer as named tensors and plain scalars, for checkpoints without pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Scalar = float | int | bool


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """Everything that moves with the steps: tensors and scalars, each under `<parameter name>/<key>`.

    Settings (betas, learning rates) are not in it: they come from the recipe. The tensors are the optimizer's own, but for those
    that it shares between parameters (the 8-bit code book), which safetensors cannot hold twice.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Scalar] = {}
    seen: set[int] = set()
    for name, param, _ in _named_params(optimizer):
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.clone() if id(value) in seen else value
                seen.add(id(value))
            elif value is not None:
                scalars[f"{name}/{key}"] = value
    return tensors, scalars


def restore_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Scalar]) -> None:
    """Put a kept state into a freshly built optimizer over parameters of the same names; the next update is the same.

    Tensors keep their own dtype (torch's `load_state_dict` would cast a float32 state to the dtype of a bfloat16 weight) and go to
    the device of their parameter.

    Raises:
        RunError: the state is of a parameter that this optimizer does not train.
    """
    restored: dict[str, dict[str, Any]] = {}
    for path, value in {**tensors, **scalars}.items():
        name, _, key = path.rpartition("/")
        restored.setdefault(name, {})[key] = value
    known = {name for name, _, _ in _named_params(optimizer)}
    strangers = sorted(set(restored) - known)
    if strangers:
        problems = [Problem(name, "is not a parameter of this optimizer") for name in strangers[:10]]
        raise RunError(f"the optimizer state holds {len(strangers)} parameters that are not trained", problems)
    for name, param, group in _named_params(optimizer):
        if name in restored:
            optimizer.state[param] = {key: _placed(key, value, param, group) for key, value in restored[name].items()}


def _named_params(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        for name, param in zip(group["names"], group["params"], strict=True):
            yield name, param, group


def _placed(key: str, value: Any, param: Tensor, group: Mapping[str, Any]) -> Any:
    """A copy of `value` where its optimizer looks for it."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    # torch keeps the step count on the CPU unless a fused or captured kernel reads it
    stays = key == "step" and not group.get("fused") and not group.get("capturable")
    return value.detach().clone() if stays else value.detach().to(param.device, copy=True)
