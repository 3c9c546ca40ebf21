"""Whether a run fits: disk for its checkpoints, memory for its weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.errors import RequestError
from ftcli.methods.parameter_groups import trained_parameters
from ftcli.units import format_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

# Adam keeps two numbers a weight; a checkpoint holds them and the weight.
NUMBERS_PER_WEIGHT = 3


def checkpoint_bytes(module: nn.Module) -> int:
    """Bytes of one checkpoint with a two-moment optimizer."""
    return NUMBERS_PER_WEIGHT * sum(p.numel() * p.element_size() for _, p in trained_parameters(module))


def needed_disk_bytes(module: nn.Module, keep: int) -> int:
    """The kept checkpoints, the best one, one being written, and the result."""
    size = checkpoint_bytes(module)
    return (keep + 2) * size + size // NUMBERS_PER_WEIGHT


def training_bytes(module: nn.Module, at_work: float = 1.0) -> int:
    """Weights, gradients and optimizer state; activations come on top.

    Args:
        at_work: share of the trained numbers that have gradients and state at a time.
    """
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return weights + int(at_work * checkpoint_bytes(module))


def device_bytes(device: torch.device) -> int:
    """Memory of a device, or of this machine."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(module: nn.Module, device: torch.device, at_work: float = 1.0) -> None:
    """Refuse a run that cannot fit even without a single activation.

    Args:
        at_work: share of the trained numbers that have gradients and state at a time.

    Raises:
        RequestError: weights, gradients and optimizer state need more than the device has.
    """
    needed, there = training_bytes(module, at_work), device_bytes(device)
    if needed > there:
        parts = "weights, gradients and optimizer"
        raise RequestError(
            f"the run needs at least {format_bytes(needed)} of memory for {parts}; {device} has {format_bytes(there)}",
            hint="method.kind: lora or qlora, or train.optimizer.kind: adamw-8bit",
        )


def free_disk_bytes(path: Path) -> int:
    """Bytes free where `path` is, or will be."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_disk(path: Path, module: nn.Module, keep: int) -> None:
    """Refuse a run whose checkpoints cannot fit.

    Raises:
        RequestError: less is free than the run will need.
    """
    needed, free = needed_disk_bytes(module, keep), free_disk_bytes(path)
    if needed > free:
        raise RequestError(
            f"the run needs about {format_bytes(needed)} of disk for {keep} checkpoints and {format_bytes(free)} are free at {path}",
            hint="free some space, give another `output`, or a smaller `every.keep`",
        )
