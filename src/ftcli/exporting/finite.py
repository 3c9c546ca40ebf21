"""Weights that are no finite numbers: found before anything is made of them, because a comparison with NaN says nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn

_LISTED = 5


def require_finite(module: nn.Module, what: str) -> None:
    """Refuse a model or an adapter with weights that are NaN or infinite.

    Args:
        what: it is, for the message.

    Raises:
        RequestError: names the tensors.
    """
    sick = {_plain_name(name): number for name, parameter in module.named_parameters() if (number := num_not_finite(parameter))}
    hint = "nothing was written; take a checkpoint from before the training diverged, or load it anew"
    _refuse({name: f"NaN or infinite numbers: {number:,}" for name, number in sick.items()}, what, "broken", hint)


def require_range(tensors: Iterable[tuple[str, Tensor]], dtype: str, what: str) -> None:
    """Refuse weights that are finite, and infinite once they are rounded to `dtype`.

    Args:
        tensors: of finite numbers, with their names.
        dtype: torch's name of it; what is no floating type of torch's has a range that its own format looks after.
        what: cannot be done, for the message.

    Raises:
        RequestError: names the tensors.
    """
    import torch

    narrow = getattr(torch, dtype, None)
    if not isinstance(narrow, torch.dtype) or not narrow.is_floating_point:
        return
    sick = {}
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.to(narrow).isfinite().all()):
            sick[_plain_name(name)] = (
                f"its largest number is {tensor.abs().max().item():.3g}, {dtype} ends at {torch.finfo(narrow).max:.3g}"
            )
    _refuse(sick, what, f"beyond {dtype}", "nothing was written; `--dtype bfloat16` or `float32` holds it")


def _refuse(sick: Mapping[str, str], what: str, state: str, hint: str) -> None:
    if sick:
        problems = [Problem(name, found) for name, found in list(sick.items())[:_LISTED]]
        more = f", {_LISTED} of them listed" if len(sick) > _LISTED else ""
        summary = f"{what}: {len(sick)} {'tensor is' if len(sick) == 1 else 'tensors are'} {state}{more}"
        raise RequestError(summary, problems, hint=hint)


def num_not_finite(tensor: nn.Parameter) -> int:
    """Entries that are NaN or infinite; quantised weights are whole numbers, which have none."""
    return int(tensor.numel() - tensor.isfinite().sum()) if tensor.is_floating_point() else 0


def _plain_name(name: str) -> str:
    """As it stands in the files, without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
