"""`ftcli train NEXT --after RUN`: a life of runs, each from the last, with a sample of all earlier data replayed in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.buffer import fill_buffer, read_buffer
from ftcli.data.settings import EvaluationSource
from ftcli.errors import Problem, RequestError, UsageError
from ftcli.files import write_json
from ftcli.recipe.chain import MERGED
from ftcli.recipe.load import LoadedRecipe, load_recipe
from ftcli.recipe.recipe import Recipe
from ftcli.reporting.stages import write_stages_report
from ftcli.training.folder import RunFolder
from ftcli.training.run import run_folder, run_recipe
from ftcli.training.stages import Summary, over_stages, report_lines, require_proven

if TYPE_CHECKING:
    from ftcli.reporting.live import Reporter

STAGES_FILE, STAGES_REPORT = "stages.json", "stages.html"


def run_after(loaded: LoadedRecipe, earlier: Path, reporter: Reporter, *, replay_rows: int, resume: bool = False) -> Summary:
    """Train `loaded` from where the run at `earlier` ended, prove that it began there, and report over all runs before it.

    Args:
        replay_rows: the size of the buffer: rows of all earlier runs' data that are replayed; 0 for none.

    Raises:
        RequestError: the earlier run is not finished, is of another base, or its data is not there any more.
        GateError: the run did not begin where the earlier one ended.
    """
    following = follow(loaded, earlier, replay_rows, reporter)
    summary = run_recipe(following, reporter, resume=resume)
    folder = run_folder(following.recipe)
    folder.update_manifest(after=str(earlier.resolve()))
    runs = [*history(earlier), folder]
    names = [f"{index}-{run.manifest()['name']}" for index, run in enumerate(runs, 1)]
    found = over_stages(names, [run.manifest()["summary"] for run in runs])
    write_json(folder.path / STAGES_FILE, {"runs": [str(run.path) for run in runs], **found})
    write_stages_report(folder.path / STAGES_REPORT, f"{following.recipe.name} and before", found, [run.path for run in runs])
    reporter.note("\n" + "\n".join(report_lines(found)))
    require_proven(found)
    return {**summary, "stages": found}


def history(run: Path) -> list[RunFolder]:
    """The run and all before it, the first one first.

    Raises:
        UsageError: one of them is no finished run.
    """
    found: list[RunFolder] = []
    path: Path | None = run.resolve()
    while path is not None:
        folder = RunFolder(path)
        manifest = folder.manifest()
        if manifest.get("summary") is None:
            what = "is not finished" if manifest else "is no run folder"
            hint = "ftcli train --resume goes on with it" if manifest else "name the folder that ftcli train has written"
            raise UsageError(f"`{path}` {what}", hint=hint)
        found.append(folder)
        path = None if manifest.get("after") is None else Path(manifest["after"])
    return found[::-1]


def follow(loaded: LoadedRecipe, earlier: Path, replay_rows: int, reporter: Reporter) -> LoadedRecipe:
    """The recipe with its beginning, the buffer and the earlier runs' evaluation sources written into it.

    Raises:
        RequestError: it names another base, or begins elsewhere already.
    """
    history(earlier)
    earlier = earlier.resolve()
    previous, recipe = load_recipe(earlier / "recipe.resolved.yaml").recipe, loaded.recipe
    _require_open(loaded, previous)
    changes: dict[str, Any] = _beginning(recipe, previous, earlier, reporter)
    kept = [] if replay_rows == 0 else _buffer(previous, earlier, replay_rows)
    own = [_as_retained(source) for source in recipe.data.evaluation]
    retained = [source for source in map(_as_retained, previous.data.evaluation) if source not in own]
    data = recipe.data.model_dump(mode="json", exclude_unset=True)
    data["train"] += [source.model_dump(mode="json") for source in kept]
    data["evaluation"] = [source.model_dump(mode="json") for source in (*recipe.data.evaluation, *retained)]
    document = {**recipe.model_dump(mode="json"), **changes, "data": data}
    found = Recipe.model_validate_json(json.dumps(document))
    return replace(loaded, recipe=found)


def _as_retained(source: EvaluationSource) -> EvaluationSource:
    return source.model_copy(update={"role": "retained"})


def _require_open(loaded: LoadedRecipe, previous: Recipe) -> None:
    recipe = loaded.recipe
    problems = []
    if recipe.init_from is not None:
        problems.append(Problem("init_from", "--after says where the run begins", "remove one of the two"))
    if (recipe.model.base, recipe.model.init) != (previous.model.base, previous.model.init):
        what = f"is `{recipe.model.base or 'random weights'}`, and the earlier run's was `{previous.model.base or 'random weights'}`"
        problems.append(Problem("model.base", what, "name the same base: the run begins with what became of it"))
    if problems:
        raise RequestError("the run cannot begin after the other", problems)


def _beginning(recipe: Recipe, previous: Recipe, earlier: Path, reporter: Reporter) -> dict[str, Any]:
    """What changes of `model` and `init_from`."""
    if previous.method.artefact == "adapter" and recipe.method == previous.method:
        return {"init_from": {"path": str(earlier), "adapter": "keep"}, "model": previous.model.model_dump(mode="json")}
    folder = earlier / "model"
    if previous.method.artefact == "adapter":
        from ftcli.exporting.merge_run import merge_run

        folder = earlier / MERGED
        if not folder.is_dir():
            reporter.note(merge_run(earlier, folder, progress=reporter).line())
    fresh = {"base": str(folder), "init": None, "revision": None, "tokenizer": None, "add_tokens": None, "grow": None, "rope": None}
    return {"model": {**recipe.model.model_dump(mode="json"), **fresh}}


def _buffer(previous: Recipe, earlier: Path, size: int) -> list[Any]:
    """The sample of what the earlier run and all before it were trained on, written into the earlier run's folder once."""
    folder = earlier / f"replay-{size}"
    kept = read_buffer(folder)
    if not kept:
        before = [entry for path in _buffers_of(previous) for entry in read_buffer(path)]
        known = {entry.source.source for entry in before}
        own = [source for source in previous.data.train if source.source not in known]
        kept = fill_buffer(own, before, folder, size, previous.train.seed, f" of {previous.name}")
    return [entry.source for entry in kept]


def _buffers_of(recipe: Recipe) -> list[Path]:
    """Folders of buffers among the sources."""
    files = [Path(source.source.path) for source in recipe.data.train if source.source.kind == "file" and source.role == "replay"]
    return list(dict.fromkeys(file.parent for file in files))
