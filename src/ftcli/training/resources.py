"""Whether a run fits: disk for its checkpoints, memory for its weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ftcli.errors import Problem, RequestError
from ftcli.methods.adapter_off import trained_in_place
from ftcli.methods.parameter_groups import trained_parameters
from ftcli.units import format_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftcli.recipe.recipe import Recipe

FISHER_BYTES = 2
# Adam keeps two numbers a weight; a checkpoint holds them and the weight.
NUMBERS_PER_WEIGHT = 3


def checkpoint_bytes(module: nn.Module) -> int:
    """Bytes of one checkpoint with a two-moment optimizer."""
    return NUMBERS_PER_WEIGHT * sum(p.numel() * p.element_size() for _, p in trained_parameters(module))


def needed_disk_bytes(module: nn.Module, keep: int) -> int:
    """The kept checkpoints, the best one, one being written, and the result."""
    size = checkpoint_bytes(module)
    return (keep + 2) * size + size // NUMBERS_PER_WEIGHT


def training_bytes(module: nn.Module, at_work: float = 1.0, held: int = 0) -> int:
    """Weights, gradients, optimizer state and what regularizers hold; activations come on top.

    Args:
        at_work: share of the trained numbers that have gradients and state at a time.
        held: as `held_bytes` counts it.
    """
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return weights + int(at_work * checkpoint_bytes(module)) + held


def held_bytes(recipe: Recipe, module: nn.Module) -> int:
    """What the recipe's regularizers hold beside the model: its start once for all of them, Fisher information, the base's values of
    what trains in place beside an adapter, and teachers that are models of their own.

    A teacher whose answers are cached is gone before the first step.

    Raises:
        RequestError: the configuration of a teacher cannot be read.
    """
    from ftcli.objectives.regularize.ewc import EWC
    from ftcli.objectives.regularize.kl import KL

    trained = [parameter for _, parameter in trained_parameters(module)]
    holds_start, others = False, 0
    for settings in recipe.objective.regularize:
        if settings.weight <= 0:
            continue
        if not isinstance(settings, KL):
            holds_start = True
            others += FISHER_BYTES * sum(p.numel() for p in trained) if isinstance(settings, EWC) else 0
        elif settings.cache is None:
            teacher = teacher_kind(settings.teacher, recipe, module)
            holds_start = holds_start or teacher == "start"
            others += _in_place_bytes(module) if teacher == "off" else 0
            others += _teacher_bytes(settings.teacher, recipe, module) if teacher == "other" else 0
    return others + (sum(p.numel() * p.element_size() for p in trained) if holds_start else 0)


def teacher_kind(name: str, recipe: Recipe, module: nn.Module) -> Literal["off", "start", "other"]:
    """What answers under a name: the model with its adapter off, with its first weights, or another model.

    After `init_from` what trains in place begins as something else than the base, of which a copy is then needed.
    """
    if name == "base" and recipe.method.artefact != "model":
        is_moved = recipe.init_from is not None and (recipe.model.add_tokens is not None or trained_in_place(module))
        return "other" if is_moved else "off"
    return "start" if name == "start" or (name == "base" and recipe.init_from is None) else "other"


def _in_place_bytes(module: nn.Module) -> int:
    names = set(trained_in_place(module))
    return sum(p.numel() * p.element_size() for name, p in trained_parameters(module) if name in names)


def teacher_refused(error: RequestError) -> RequestError:
    """The same, said of the key that named the model."""
    where = "objective.regularize.teacher"
    said = [(problem.where.removeprefix("model.base: "), problem.what, problem.hint) for problem in error.problems]
    problems = [Problem(where, f"`{name}` {what}" if name else what, hint) for name, what, hint in said]
    return RequestError("the teacher cannot be loaded", problems or [Problem(where, error.summary, error.hint)])


def _teacher_bytes(name: str, recipe: Recipe, module: nn.Module) -> int:
    """Of a second model: as large as the one that trains, or as its own configuration says."""
    own = list(module.parameters())
    if name == "base":
        return sum(p.numel() * p.element_size() for p in own)
    import torch
    from transformers import AutoModelForCausalLM

    from ftcli.models.load import load_config

    try:
        config = load_config(type(recipe.model)(base=name, trust_remote_code=recipe.model.trust_remote_code))
    except RequestError as error:
        raise teacher_refused(error) from error
    with torch.device("meta"):
        numbers: int = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    floating = next((p.element_size() for p in own if p.is_floating_point()), 4)
    return numbers * floating


def memory_parts(held: int) -> str:
    """What `training_bytes` counts, in words.

    Example:
        >>> memory_parts(0), memory_parts(2**30)
        ('weights, gradients and optimizer', 'weights, gradients, optimizer and `objective.regularize` (1.0 GiB)')
    """
    if not held:
        return "weights, gradients and optimizer"
    return f"weights, gradients, optimizer and `objective.regularize` ({format_bytes(held)})"


def device_bytes(device: torch.device) -> int:
    """Memory of a device, or of this machine."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(module: nn.Module, device: torch.device, at_work: float = 1.0, held: int = 0) -> None:
    """Refuse a run that cannot fit even without a single activation.

    Args:
        at_work: share of the trained numbers that have gradients and state at a time.
        held: as `held_bytes` counts it.

    Raises:
        RequestError: weights, gradients, optimizer state and what regularizers hold need more than the device has.
    """
    needed, there = training_bytes(module, at_work, held), device_bytes(device)
    if needed > there:
        lighter = "method.kind: lora or qlora, or train.optimizer.kind: adamw-8bit"
        fits_without = held and needed - held <= there
        raise RequestError(
            f"the run needs at least {format_bytes(needed)} of memory for {memory_parts(held)}; {device} has {format_bytes(there)}",
            hint="objective.regularize: [], or `cache` for a `kl` with a model of its own" if fits_without else lighter,
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
