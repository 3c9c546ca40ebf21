"""What holds a stage of a chain may be what a stage before will have left: its model, or its Fisher information."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ftcli.errors import Problem
from ftcli.models.settings import Model
from ftcli.objectives import Objective
from ftcli.objectives.regularize import Regularizer
from ftcli.objectives.regularize.ewc import EWC
from ftcli.objectives.regularize.kl import KL
from ftcli.recipe.recipe import Recipe


def not_left(recipe: Recipe, begin: str, before: Sequence[tuple[Path, Recipe, str]], folder: Path, merged: str) -> Iterator[Problem]:
    """Regularizers that name something of this chain that no stage before leaves.

    Args:
        before: run folder, recipe and beginning of the stages before.
        folder: of all stages.
        merged: name of the folder with a stage's adapter merged into its base.
    """
    begins = [*(own for _, _, own in before), begin]
    models, fishers = set[Path](), set[Path]()
    for index, (run, own, _) in enumerate(before):
        if own.method.artefact == "model":
            models.add(run.resolve() / "model")
        elif begins[index + 1] == "merge":
            models.add(run.resolve() / merged)
        trains_on = own.method.artefact == "model" or set(begins[index + 1 :]) == {"keep"}
        if trains_on and own.method.kind == recipe.method.kind and any(r.kind == "ewc" and r.weight for r in own.objective.regularize):
            fishers.add(run.resolve())
    for index, settings in enumerate(recipe.objective.regularize):
        left = models if isinstance(settings, KL) else fishers
        path = _named(settings)
        if settings.weight and path is not None and _is_within(path, folder) and path.resolve() not in left:
            what = "no model that a stage before leaves" if isinstance(settings, KL) else "no stage before with `ewc` on what trains here"
            hint = f"one of {', '.join(f'`{name}`' for name in sorted(map(str, left)))}" if left else None
            yield Problem(f"stages.{len(before)}.objective.regularize.{index}", f"`{path}` is {what}", hint)


def held_to_the_base(recipe: Recipe, first: Model, folder: Path, *, is_first: bool) -> Objective:
    """What holds a stage, with the chain's base for what stages before it will have left: before these are trained.

    Args:
        first: the model of the chain.
        folder: of all stages.
    """
    teacher = "base" if first.base is None or first.add_tokens is not None else first.base

    def stand_in(settings: Regularizer) -> Regularizer:
        path = _named(settings)
        if path is None:
            return settings
        if isinstance(settings, KL):
            return settings.model_copy(update={"teacher": teacher}) if _is_within(path, folder) else settings
        # Whether the Fisher information of another run is of this stage's adapter, is known once there is one.
        is_told_later = not is_first and recipe.method.artefact == "adapter" and path.exists()
        return settings.model_copy(update={"earlier": None}) if is_told_later or _is_within(path, folder) else settings

    return recipe.objective.model_copy(update={"regularize": tuple(map(stand_in, recipe.objective.regularize))})


def moved(recipe: Recipe, own: Path, folder: Path) -> Recipe:
    """The recipe with what its regularizers name within `own`, the stages' folder, in another one."""
    if own == folder:
        return recipe

    def elsewhere(settings: Regularizer) -> Regularizer:
        path = _named(settings)
        if path is None or not _is_within(path, own):
            return settings
        key = "teacher" if isinstance(settings, KL) else "earlier"
        return settings.model_copy(update={key: str(folder.resolve() / path.resolve().relative_to(own.resolve()))})

    objective = recipe.objective.model_copy(update={"regularize": tuple(map(elsewhere, recipe.objective.regularize))})
    return recipe.model_copy(update={"objective": objective})


def _named(settings: Regularizer) -> Path | None:
    """The earlier run or the model that a regularizer names, where it is a path."""
    named = settings.teacher if isinstance(settings, KL) else settings.earlier if isinstance(settings, EWC) else None
    return Path(named) if named is not None and Path(named).is_absolute() else None


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
