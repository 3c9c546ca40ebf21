"""Checkpoints: all that a run needs to go on as if it had never stopped, without pickle.

checkpoints/step-000120/
    trainable.safetensors    the parameters that train, by name
    optimizer.safetensors    the optimizer's tensors, by <parameter>/<key>
    method.safetensors       what else moves with the steps under this method, where something does
    progress.json            step, batch chain, best loss, optimizer scalars, loss scale, hashes of the files above
best.json beside them names the checkpoint of the lowest evaluation loss.
A checkpoint appears under its name only when it is complete and on the disk.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import RunError
from ftcli.files import PARTIAL, new_folder, sha256_of, write_exact_json, write_json
from ftcli.methods.parameter_groups import trained_parameters
from ftcli.optim.state import optimizer_state, restore_optimizer_state
from ftcli.training.loop import Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftcli.training.step import Learner

_FOLDER = re.compile(r"step-(\d+)")
FORMAT = 1
METHOD_FILE = "method.safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints folder of a run."""

    folder: Path
    keep: int

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        matches = (_FOLDER.fullmatch(path.name) for path in self.folder.glob("step-*")) if self.folder.is_dir() else ()
        return sorted(int(match[1]) for match in matches if match)

    def save(self, learner: Learner, progress: Progress) -> Path:
        """Write a checkpoint of the last finished step and remove those no longer wanted.

        Raises:
            RunError: the disk is full; older checkpoints are untouched.
        """
        from safetensors.torch import save_file

        folder = self.path(progress.step)
        tensors, scalars = optimizer_state(_plain(learner.optimizer))
        with new_folder(folder) as partial:
            save_file(trainable_tensors(unwrapped(learner)), partial / "trainable.safetensors")
            save_file(_on_cpu(tensors), partial / "optimizer.safetensors")
            if method_state := learner.method.state(unwrapped(learner)):
                save_file(_on_cpu(method_state), partial / METHOD_FILE)
            files = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
            scaler = learner.accelerator.scaler
            state = {"format": FORMAT, "progress": asdict(progress), "optimizer_scalars": scalars, "files": files}
            write_exact_json(partial / "progress.json", {**state, "scaler": None if scaler is None else scaler.state_dict()})
        if progress.best_step is not None:
            write_json(
                self.folder / "best.json",
                {"step": progress.best_step, "loss": progress.best_loss, "folder": self.path(progress.best_step).name},
            )
        self._prune(progress)
        return folder

    def _prune(self, progress: Progress) -> None:
        """Keep the newest `keep` and the best one."""
        for step in self.steps()[: -self.keep]:
            if step != progress.best_step:
                # Renamed first: a folder that is half removed must not look like a checkpoint.
                aside = self.folder / f"{PARTIAL}removed-step-{step:06d}"
                self.path(step).rename(aside)
                shutil.rmtree(aside)

    def load(self, step: int, learner: Learner) -> Progress:
        """Put a checkpoint's weights and optimizer state into `learner`.

        Raises:
            RunError: a file is damaged, or the parameters are not the ones that train.
        """
        from safetensors.torch import load_file

        folder = self.path(step)
        state = verified_state(folder)
        load_trainable(unwrapped(learner), folder)
        restore_optimizer_state(_plain(learner.optimizer), load_file(folder / "optimizer.safetensors"), state["optimizer_scalars"])
        if METHOD_FILE in state["files"]:
            learner.method.restore(unwrapped(learner), load_file(folder / METHOD_FILE))
        if learner.accelerator.scaler is not None and state["scaler"] is not None:
            learner.accelerator.scaler.load_state_dict(state["scaler"])
        return Progress(**state["progress"])


def unwrapped(learner: Learner) -> nn.Module:
    """The module the method returned, without what accelerate and `TreeModel` put around it."""
    module: nn.Module = learner.accelerator.unwrap_model(learner.model).module
    return module


def _plain(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def trainable_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name, on the CPU."""
    return _on_cpu(dict(trained_parameters(module)))


def load_trainable(module: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's weights into `module`'s trainable parameters, in place.

    Raises:
        RunError: names or shapes differ.
    """
    import torch
    from safetensors.torch import load_file

    kept = load_file(folder / "trainable.safetensors")
    parameters = dict(trained_parameters(module))
    different = sorted(set(kept) ^ set(parameters)) + [n for n in set(kept) & set(parameters) if kept[n].shape != parameters[n].shape]
    if different:
        raise RunError(f"checkpoint {folder.name} is of other parameters: {', '.join(different[:5])}{' ...' if len(different) > 5 else ''}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])


def verified_state(folder: Path) -> dict[str, Any]:
    """progress.json of a checkpoint whose files are all as they were written.

    Raises:
        RunError: a file is missing or changed.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "progress.json").read_text())
        damaged = [name for name, digest in state["files"].items() if sha256_of(folder / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"checkpoint {folder.name} cannot be read: {error}", hint="remove this folder to go on from the one before"
        ) from error
    if damaged:
        raise RunError(f"checkpoint {folder.name} is damaged: {', '.join(damaged)}", hint="remove this folder to go on from the one before")
    return state
