"""The Fisher information of a run on disk: `ewc` measures it once, and later runs go on with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.errors import Problem, RequestError
from ftcli.files import PARTIAL, said_when_disk_is_full

if TYPE_CHECKING:
    from torch import Tensor

FISHER_FILE = "fisher.safetensors"


def require_fisher_file(run: str) -> None:
    """
    Raises:
        RequestError: the earlier run that is named has no Fisher information.
    """
    if not (Path(run) / FISHER_FILE).is_file():
        what = f"`{run}` is no run with `ewc`: it has no {FISHER_FILE}"
        raise RequestError("the earlier Fisher information cannot be had", [Problem("objective.regularize.earlier", what)])


def require_same_shapes(path: Path, where: str, parameters: Mapping[str, Tensor]) -> None:
    """
    Args:
        where: key of the recipe that named the file.
        parameters: what trains here.

    Raises:
        RequestError: what is in the file is of other weights.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dict
    if found != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
        problem = Problem(where, f"`{path}` is of other weights than those that train here", "the same base and method")
        raise RequestError("the Fisher information does not fit", [problem])


def read_fisher(path: Path, where: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """F of `parameters` from a file, each on the device of its parameter.

    Raises:
        RequestError: it is of other weights.
    """
    from safetensors.torch import load_file

    require_same_shapes(path, where, parameters)
    found = load_file(path)
    return {name: found[name].to(parameter.device) for name, parameter in parameters.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors under a name that is there only when they are complete."""
    from safetensors.torch import save_file

    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    with said_when_disk_is_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(path)
