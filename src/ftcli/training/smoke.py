"""A smoke run: the whole recipe end to end on a few rows, in a folder of its own that is removed when all went well."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.models.locate import model_folder
from ftcli.reporting.live import Reporter
from ftcli.training.run import run_folder, run_recipe

if TYPE_CHECKING:
    from ftcli.data.settings import EvaluationSource
    from ftcli.methods import Method
    from ftcli.models.settings import Model
    from ftcli.recipe.load import LoadedRecipe
    from ftcli.recipe.recipe import Recipe
    from ftcli.recipe.train import Train

ROWS = 32
STEPS = 4
MAX_RANK = 8
# Above this a local base is too slow for a minute on a CPU, and a tiny model of its architecture stands in.
MAX_BASE_BYTES = 600_000_000


def smoke_recipe(recipe: Recipe) -> Recipe:
    """`recipe` cut down to seconds: few rows, few steps, a small stand-in for a base that is not here."""
    folder = run_folder(recipe).path
    small = short_recipe(recipe).model_copy(
        update={"name": f"{recipe.name}-smoke", "output": str(folder.with_name(f"{folder.name}-smoke"))}
    )
    return with_stand_in(small) if needs_stand_in(recipe.model) else small


def short_recipe(recipe: Recipe) -> Recipe:
    """`recipe` with few rows and few steps, in its own folder and on its own base."""
    evaluate = 2 if recipe.data.evaluation or recipe.data.held_out() is not None else None
    every = recipe.every.model_copy(update={"log": 1, "evaluate": evaluate, "save": 2})
    data = recipe.data.model_copy(update={"evaluation": tuple(map(_small_evaluation, recipe.data.evaluation))})
    changes = {
        "train": _short_training(recipe.train),
        "every": every,
        "data": data,
        "objective": recipe.objective.on_few_rows(),
        "trackers": (),
    }
    return recipe.model_copy(update=changes)


def needs_stand_in(model: Model) -> bool:
    """The base is not on this machine, or is too large for a minute."""
    return model.base is not None and not _is_here_and_small(model.base)


def with_stand_in(recipe: Recipe) -> Recipe:
    """`recipe` on a tiny model in place of its base, with ranks that fit it."""
    return recipe.model_copy(update={"model": _stand_in(recipe.model), "method": small_method(recipe.method)})


def _short_training(train: Train) -> Train:
    changes: dict[str, Any] = {
        "epochs": None,
        "max_tokens": None,
        "steps": STEPS,
        "global_batch_size": min(train.global_batch_size, 4),
        "compile": False,
    }
    if getattr(train.schedule, "warmup_steps", None) is not None:
        changes["schedule"] = train.schedule.model_copy(update={"warmup_steps": 1})
    return train.model_copy(update=changes)


def _small_evaluation(source: EvaluationSource) -> EvaluationSource:
    generate = source.generate
    if generate is not None:
        generate = generate.model_copy(update={"limit": 4, "max_new_tokens": min(16, generate.max_new_tokens)})
    return source.model_copy(update={"limit": min(source.limit or ROWS, ROWS), "generate": generate})


def _is_here_and_small(base: str) -> bool:
    if not base.startswith("builtin:") and not Path(base).exists():
        return False
    return sum(path.stat().st_size for path in model_folder(base).glob("*.safetensors")) <= MAX_BASE_BYTES


def _stand_in(model: Model) -> Model:
    """A tiny random model of the same architecture, with the same tokenizer."""
    from ftcli.models.load import load_config
    from ftcli.models.tiny import tiny_init

    assert model.base is not None
    tokenizer = model.tokenizer or str(model_folder(model.base, model.revision, weights=False))
    changes = {"base": None, "revision": None, "init": tiny_init(load_config(model)), "tokenizer": tokenizer, "dtype": "float32"}
    return model.model_copy(update=changes)


def small_method(method: Method) -> Method:
    """Ranks that fit the matrices of a tiny model."""
    changes: dict[str, Any] = {}
    if hasattr(method, "rank"):
        changes["rank"] = min(method.rank, MAX_RANK)
    if hasattr(method, "rank_pattern"):
        changes["rank_pattern"] = {name: min(rank, MAX_RANK) for name, rank in method.rank_pattern.items()}
    return method.model_copy(update=changes)


def smoke_run(loaded: LoadedRecipe, reporter: Reporter) -> dict[str, Any]:
    """Train, save, prove, go on from the last checkpoint, and merge, on a few rows.

    Raises:
        FtcliError: whatever would stop the real run.
    """
    small = replace(loaded, recipe=smoke_recipe(loaded.recipe))
    note_stand_in(small.recipe.model, loaded.recipe.model, reporter)
    folder = run_folder(small.recipe)
    shutil.rmtree(folder.path, ignore_errors=True)
    reporter.shows_next = False
    summary = run_recipe(small, reporter, first_rows=ROWS)
    # Without its summary the run is one that was killed before it could say that it is finished.
    folder.update_manifest(summary=None)
    run_recipe(small, Reporter(stream=reporter.stream, silent=True), resume=True, first_rows=ROWS)
    reporter.note(f"\nresumed from the checkpoint of step {summary['steps']}, and proven again")
    method = small.recipe.method
    if method.artefact == "adapter" and method.merges:
        from ftcli.exporting.merge_run import merge_run

        report = merge_run(folder.path, folder.path / "merged")
        reporter.note(report.line())
    shutil.rmtree(folder.path)
    reporter.note(f"ok: the smoke run of {loaded.path.name} went through; its folder is removed")
    return {**summary, "smoke": True}


def note_stand_in(small: Model, own: Model, reporter: Reporter) -> None:
    """Say so where another base is trained than the recipe's."""
    if small.base != own.base:
        assert small.init is not None
        reporter.note(f"a tiny {small.init.architecture} with random weights stands in for {own.base}")
