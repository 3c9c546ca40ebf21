"""A smoke run of a chain: all stages end to end on a few rows, in a folder of their own that is removed when all went well."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.recipe.chain import LoadedChain, load_chain
from ftcli.recipe.write import resolved_yaml
from ftcli.reporting.live import Reporter
from ftcli.training.chain import run_chain
from ftcli.training.run import run_folder
from ftcli.training.smoke import ROWS, needs_stand_in, note_stand_in, short_recipe, small_method, with_stand_in

if TYPE_CHECKING:
    from ftcli.training.stages import Summary


def smoke_chain(path: Path, overrides: Sequence[str], reporter: Reporter) -> Summary:
    """Train every stage, prove each and that it began where the last ended, and go on from each stage's last checkpoint.

    Raises:
        RecipeError: the chain cannot be read.
        FtcliError: whatever would stop the real chain.
    """
    own = load_chain(path, overrides, suffix="-smoke")
    small = _short_chain(own)
    note_stand_in(small.stages[0].loaded.recipe.model, own.stages[0].loaded.recipe.model, reporter)
    shutil.rmtree(small.folder, ignore_errors=True)
    summary = run_chain(small, reporter, first_rows=ROWS)
    for stage in small.stages:
        # Without its summary the stage is one that was killed before it could say that it is finished.
        run_folder(stage.loaded.recipe).update_manifest(summary=None)
    run_chain(small, Reporter(stream=reporter.stream, silent=True), resume=True, first_rows=ROWS)
    reporter.note("\nevery stage resumed from its last checkpoint, and proven again")
    shutil.rmtree(small.folder)
    reporter.note(f"ok: the smoke run of {path.name} went through; its folder is removed")
    return {**summary, "smoke": True}


def _short_chain(own: LoadedChain) -> LoadedChain:
    """Every stage cut down; where the first base is not here, all stages are on what is trained from its stand-in."""
    first = own.stages[0].loaded.recipe
    is_elsewhere = needs_stand_in(first.model)
    stages = []
    for index, stage in enumerate(own.stages):
        recipe = short_recipe(stage.loaded.recipe)
        if is_elsewhere:
            # The stand-in is drawn with the seed: of all stages on it the same.
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": first.train.seed})})
            is_on_it = index == 0 or recipe.model.base == first.model.base
            recipe = with_stand_in(recipe) if is_on_it else recipe.model_copy(update={"method": small_method(recipe.method)})
        stages.append(replace(stage, loaded=replace(stage.loaded, recipe=recipe, text=resolved_yaml(recipe))))
    return replace(own, stages=tuple(stages))
