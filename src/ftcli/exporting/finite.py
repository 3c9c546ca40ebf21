"""Weights that are no finite numbers: found before anything is made of them, because a comparison with NaN says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from torch import nn

_LISTED = 5


def require_finite(module: nn.Module, what: str) -> None:
    """Refuse a model or an adapter with weights that are NaN or infinite.

    Args:
        what: it is, for the message.

    Raises:
        RequestError: names the tensors.
    """
    sick = {_plain_name(name): number for name, parameter in module.named_parameters() if (number := num_not_finite(parameter))}
    if sick:
        problems = [Problem(name, f"NaN or infinite numbers: {number:,}") for name, number in list(sick.items())[:_LISTED]]
        more = f", {_LISTED} of them listed" if len(sick) > _LISTED else ""
        what = f"{what}: {len(sick)} {'tensor is' if len(sick) == 1 else 'tensors are'} broken{more}"
        raise RequestError(what, problems, hint="nothing was written; take a checkpoint from before the training diverged, or load it anew")


def num_not_finite(tensor: nn.Parameter) -> int:
    """Entries that are NaN or infinite; quantised weights are whole numbers, which have none."""
    return int(tensor.numel() - tensor.isfinite().sum()) if tensor.is_floating_point() else 0


def _plain_name(name: str) -> str:
    """As it stands in the files, without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
