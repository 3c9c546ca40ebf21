"""A smoke run: the whole recipe end to end on a few rows, in a folder of its own that is removed when all went well."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.training.run import run_folder, run_recipe

if TYPE_CHECKING:
    from ftcli.recipe.load import LoadedRecipe
    from ftcli.recipe.recipe import Recipe
    from ftcli.reporting.live import Reporter

ROWS = 32
STEPS = 4
# Above this a local base is too slow for a minute on a CPU, and a tiny model of its architecture stands in.
MAX_BASE_BYTES = 600_000_000


def smoke_recipe(recipe: Recipe) -> Recipe:
    """`recipe` cut down to seconds: few rows, few steps, a small stand-in for a base that is not here."""
    train = recipe.train.model_copy(
        update={
            "epochs": None,
            "steps": STEPS,
            "global_batch_size": min(recipe.train.global_batch_size, 4),
            "device": recipe.train.device,
            "compile": False,
        }
    )
    every = recipe.every.model_copy(update={"log": 1, "evaluate": 2, "save": 2})
    evaluation = tuple(
        source.model_copy(
            update={
                "limit": min(source.limit or ROWS, ROWS),
                "generate": source.generate
                and source.generate.model_copy(update={"limit": 4, "max_new_tokens": min(16, source.generate.max_new_tokens)}),
            }
        )
        for source in recipe.data.evaluation
    )
    data = recipe.data.model_copy(update={"evaluation": evaluation})
    output = str(run_folder(recipe).path.with_name(f"{run_folder(recipe).path.name}-smoke"))
    changes = {"name": f"{recipe.name}-smoke", "train": train, "every": every, "data": data, "output": output, "trackers": ()}
    return recipe.model_copy(update={**changes, "model": _small_base(recipe)})


def _small_base(recipe: Recipe) -> Any:
    """The base itself if it is here and small, else a tiny random model of the same architecture with the same tokenizer."""
    from ftcli.models.load import load_config
    from ftcli.models.tiny import tiny_init

    model = recipe.model
    if model.base is None or _is_here_and_small(model.base):
        return model
    init = tiny_init(load_config(model))
    return model.model_copy(update={"base": None, "init": init, "tokenizer": model.tokenizer or model.base, "dtype": "float32"})


def _is_here_and_small(base: str) -> bool:
    from ftcli.models.locate import model_folder

    if not base.startswith("builtin:") and not Path(base).exists():
        return False
    return sum(path.stat().st_size for path in model_folder(base).glob("*.safetensors")) <= MAX_BASE_BYTES


def smoke_run(loaded: LoadedRecipe, reporter: Reporter) -> dict[str, Any]:
    """Train, save, prove, resume, and merge or say why not, on a few rows.

    Raises:
        FtcliError: whatever would stop the real run.
    """
    small = replace(loaded, recipe=smoke_recipe(loaded.recipe))
    folder = run_folder(small.recipe)
    shutil.rmtree(folder.path, ignore_errors=True)
    summary = run_recipe(small, reporter, first_rows=ROWS)
    run_recipe(small, reporter, resume=True, first_rows=ROWS)
    if small.recipe.method.artefact == "adapter":
        from ftcli.exporting.merge_run import merge_run

        report = merge_run(folder.path, folder.path / "merged")
        reporter.note(f"merged: {report.line()}")
    shutil.rmtree(folder.path)
    reporter.note(f"smoke run of {Path(loaded.path).name} went through; its folder is removed")
    return {**summary, "smoke": True}
