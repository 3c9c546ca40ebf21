"""`ftcli train NEXT --after RUN`: a life of runs, each from the last, with a sample of all earlier data replayed in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.buffer import Buffer, Kept
from ftcli.data.mixtures import Mixture
from ftcli.data.mixtures.replay import Replay
from ftcli.data.names import free_name, rows_of
from ftcli.data.settings import Data, EvaluationSource
from ftcli.errors import Problem, RequestError
from ftcli.files import write_json
from ftcli.models.settings import Model
from ftcli.recipe.chain import MERGED
from ftcli.recipe.load import LoadedRecipe
from ftcli.recipe.recipe import Recipe
from ftcli.recipe.same_text import fit_of, with_fit
from ftcli.reporting.stages import write_stages_report
from ftcli.training.earlier import Earlier
from ftcli.training.folder import RunFolder
from ftcli.training.run import run_folder, run_recipe
from ftcli.training.stages import Summary, last_run, over_stages, report_lines, require_proven

if TYPE_CHECKING:
    from ftcli.data.prepare import Progress
    from ftcli.reporting.live import Reporter

STAGES_FILE, STAGES_REPORT = "stages.json", "stages.html"
# What became of these is in the earlier run's model.
_OF_THE_BASE = ("base", "init", "revision", "tokenizer", "add_tokens", "grow", "rope")


def run_after(loaded: LoadedRecipe, earlier: Path, reporter: Reporter, *, replay_rows: int, resume: bool = False) -> Summary:
    """Train `loaded` from where the run at `earlier` ended, prove that it began there, and report over all runs before it.

    Args:
        replay_rows: the size of the buffer: rows of all earlier runs' data that are replayed; 0 for none.

    Raises:
        RequestError: the earlier run is not finished, is of another base, or its data is not there any more.
        GateError: the run did not begin where the earlier one ended.
    """
    earlier = last_run(earlier)
    following = follow(loaded, earlier, replay_rows, reporter)
    summary = run_recipe(following, reporter, resume=resume)
    folder = run_folder(following.recipe)
    folder.update_manifest(after=str(earlier.resolve()))
    runs = history(folder.path, reporter)
    paths = [run.folder.path for run in runs]
    names = [f"{index}-{run.manifest['name']}" for index, run in enumerate(runs, 1)]
    found = over_stages(names, [run.manifest["summary"] for run in runs])
    _excuse_rescaled(found, [run.recipe.model for run in runs])
    write_json(folder.path / STAGES_FILE, {"runs": list(map(str, paths)), **found})
    write_stages_report(folder.path / STAGES_REPORT, f"{following.recipe.name} and before", found, paths)
    reporter.note("\n" + "\n".join(report_lines(found)))
    # Of the runs before it, this one is not to blame.
    require_proven({"proofs": found["proofs"][-1:]})
    return {**summary, "stages": found}


def _excuse_rescaled(found: Summary, models: Sequence[Model]) -> None:
    """A run that scales positions anew computes something else from its first step on: nothing can be said of where it began."""
    for proof, (before, after) in zip(found["proofs"], pairwise(models), strict=True):
        if proof["passed"] is False and after.rope is not None and after.rope != before.rope:
            proof.update(passed=None, detail=f"{proof['detail']}; `model.rope` changes what is computed")


def history(run: Path, progress: Progress) -> list[Earlier]:
    """The run and all before it that each began where the last one ended, the first one first.

    Raises:
        UsageError: it is no finished run, or came after one that is not there.
    """
    found = [Earlier(RunFolder(run.resolve()), progress).required()]
    while (before := found[-1].before) is not None and before.is_whole:
        found.append(before)
    return found[::-1]


def follow(loaded: LoadedRecipe, earlier: Path, replay_rows: int, reporter: Reporter) -> LoadedRecipe:
    """The recipe with its beginning, the buffer and the earlier runs' evaluation sources written into it.

    Raises:
        RequestError: it names another base, asks for what the earlier run's model cannot be given, or begins elsewhere already.
    """
    runs = history(last_run(earlier), reporter)
    previous, recipe = runs[-1], loaded.recipe
    _require_open(recipe, previous)
    for run in runs:
        if run.lost is not None:
            what = "whose data cannot be read any more: it is neither replayed nor measured"
            reporter.note(f"`{run.recipe.name}` began from `{run.lost.folder.path}`, {what}")
    changes = _beginning(recipe, runs, reporter)
    sampled = [] if replay_rows == 0 else _replayed(previous.buffer(replay_rows), replay_rows, recipe, reporter)
    data = recipe.data.model_dump(mode="json", exclude_unset=True)
    data["evaluation"] = [source.model_dump(mode="json") for source in _evaluation(recipe, previous, reporter)]
    if sampled:
        mixture = _mixture(recipe.data)
        weights = _weights(sampled, mixture, recipe, Model.model_validate_json(json.dumps(changes["model"])), reporter)
        sources = [entry.source.model_dump(mode="json") for entry in sampled]
        data["train"] += [{**source, "weight": weight} for source, weight in zip(sources, weights, strict=True)]
        data["mixture"] = mixture.model_dump(mode="json")
    document = {**recipe.model_dump(mode="json"), **changes, "data": data}
    return replace(loaded, recipe=Recipe.model_validate_json(json.dumps(document)))


def _require_open(recipe: Recipe, previous: Earlier) -> None:
    problems = []
    if recipe.init_from is not None:
        problems.append(Problem("init_from", "--after says where the run begins", "remove one of the two"))
    bases = [(found.model.base, found.model.init, found.model.revision) for found in previous.bases()]
    if (recipe.model.base, recipe.model.init, recipe.model.revision) not in bases:
        first = bases[-1][0] or "random weights"
        what = f"is `{recipe.model.base or 'random weights'}`, and the earlier run's was `{first}`"
        problems.append(Problem("model.base", what, "name the same base: the run begins with what became of it"))
    known = [found.model.tokenizer for found in previous.bases()]
    if recipe.model.tokenizer is not None and recipe.model.tokenizer not in known:
        what = f"is `{recipe.model.tokenizer}`, and the run begins with the earlier one's tokenizer"
        problems.append(Problem("model.tokenizer", what, "leave it out"))
    if problems:
        raise RequestError("the run cannot begin after the other", problems)


def _beginning(recipe: Recipe, runs: Sequence[Earlier], reporter: Reporter) -> dict[str, Any]:
    """What changes of `model` and `init_from`.

    Raises:
        RequestError: the base is to be another, and the adapter on it cannot be merged into it.
    """
    previous, earlier = runs[-1].recipe, runs[-1].folder.path
    added = _added(recipe, [run.recipe.model for run in runs], reporter)
    is_adapter = previous.method.artefact == "adapter"
    is_stacked = previous.init_from is not None and previous.init_from.adapter == "stack"
    if is_adapter and recipe.method == previous.method and not added and not is_stacked:
        own = {key: value for key, value in recipe.model.model_dump(mode="json", exclude_unset=True).items() if key not in _OF_THE_BASE}
        model = {**previous.model.model_dump(mode="json"), **own}
        return {"init_from": {"path": str(earlier), "adapter": "keep"}, "model": model}
    if is_adapter and added and not previous.method.merges:
        what = f"changes the base below an adapter of kind `{previous.method.kind}`, which cannot be merged into it"
        raise RequestError("the run cannot begin after the other", [Problem(f"model.{key}", what, "leave it out") for key in added])
    folder = earlier / "model"
    if is_adapter:
        from ftcli.exporting.merge_run import merge_run

        folder = earlier / MERGED
        if recipe.method == previous.method:
            why = " and ".join(f"`model.{key}`" for key in added) or "the earlier adapter has the ranks of two"
            reporter.note(f"{why}: on the base with the earlier adapter merged into it")
        if not folder.is_dir():
            reporter.note(merge_run(earlier, folder, progress=reporter).line())
    fresh = {**dict.fromkeys(_OF_THE_BASE), **added, "base": str(folder)}
    return {"model": {**recipe.model.model_dump(mode="json"), **fresh}}


def _added(recipe: Recipe, before: Sequence[Model], reporter: Reporter) -> dict[str, Any]:
    """What the recipe adds to the base beyond what earlier runs have added; the same again is there already."""
    model, added = recipe.model, dict[str, Any]()
    trains_grown = getattr(recipe.method, "grown", False)
    for key in ("grow", "rope"):
        if (value := getattr(model, key)) is None:
            continue
        # A method that trains what is grown needs something that is.
        if any(getattr(other, key) == value for other in before) and not (key == "grow" and trains_grown):
            reporter.note(f"`model.{key}` is in the earlier run's model already")
        else:
            added[key] = value.model_dump(mode="json")
    if (settings := model.add_tokens) is None:
        return added
    if settings.mine is not None:
        return {**added, "add_tokens": settings.model_dump(mode="json")}
    known = {text for other in before if other.add_tokens is not None for text in other.add_tokens.known()}
    texts = [text for text in settings.known() if text not in known]
    if len(texts) < len(settings.known()):
        reporter.note(f"{len(settings.known()) - len(texts)} of `model.add_tokens` are in the earlier run's vocabulary already")
    if texts:
        described = {token: words for token, words in settings.descriptions.items() if settings.text(token) in texts}
        added["add_tokens"] = settings.settled(texts).model_copy(update={"descriptions": described}).model_dump(mode="json")
    return added


def _evaluation(recipe: Recipe, previous: Earlier, reporter: Reporter) -> list[EvaluationSource]:
    """The recipe's own sources, and the earlier runs' that are not among them, each by a name that no other has in the life of runs."""
    before, own = previous.evaluation(), list(recipe.data.evaluation)
    fits = {rows_of(source): fit_of(source, previous.recipe) for source in before}
    as_found: dict[str, Any] = {"max_length": None, "on_overflow": None}
    retained = [source.model_copy(update=as_found) for source in before]
    held_out = recipe.data.held_out()
    names, known = [source.name for source in retained if source.name is not None], {rows_of(source): source.name for source in retained}
    if held_out is not None:
        own = [held_out if rows_of(held_out) in known else held_out.model_copy(update={"name": free_name(held_out.name or "", names)})]
    for index, source in enumerate(own):
        if rows_of(source) in known:
            own[index] = source.model_copy(update={"name": source.name or known[rows_of(source)]})
        elif source.name in names:
            name = free_name(f"{source.name} of {recipe.name}", names)
            reporter.note(f"`{source.name}` was another source in the earlier run: here it is called `{name}`")
            own[index] = source.model_copy(update={"name": name})
    mine, formats = set(map(rows_of, own)), previous.formats()
    found = []
    for source in retained:
        if rows_of(source) in mine:
            continue
        kinds = formats[rows_of(source)] if source.format is None else {source.format.kind}
        if kinds <= recipe.objective.formats:
            found.append(source)
        else:
            reporter.note(f"`{source.name}` is not measured any more: objective `{recipe.objective.kind}` cannot")
    return [with_fit(source, recipe, fits[rows]) if (rows := rows_of(source)) in fits else source for source in [*own, *found]]


def _replayed(buffer: Buffer, size: int, recipe: Recipe, reporter: Reporter) -> list[Kept]:
    """What the run replays of the buffer; says so where it is less than was asked for, though more rows were seen."""
    if buffer.num_rows < size and buffer.complete_below is not None:
        reporter.note(
            f"{buffer.num_rows} rows are replayed, not {size}: the buffer before has kept no more of what was seen, "
            "and with more of the last run's rows the sample would not be fair"
        )
    found = []
    for kept in buffer.sources:
        assert kept.source.format is not None
        if kept.source.format.kind in recipe.objective.formats:
            found.append(kept)
        else:
            reporter.note(f"`{kept.source.name}` is not replayed: objective `{recipe.objective.kind}` cannot learn from it")
    return found


def _mixture(data: Data) -> Mixture:
    """How new rows and the buffer are mixed: as the recipe says, else with a share of replay."""
    has_own = "mixture" in data.model_fields_set or any(source.role == "replay" for source in data.train)
    return data.mixture if has_own else Replay()


def _weights(kept: Sequence[Kept], mixture: Mixture, recipe: Recipe, model: Model, reporter: Reporter) -> list[float]:
    """A weight for each source of the buffer with which all of its rows are seen equally often; 1 on average.

    Each of its rows stands for equally many that were ever seen, so that of these none counts for more than another either.
    """
    if mixture.kind == "passes" or len(kept) == 1:
        return [1.0] * len(kept)
    parts = [float(entry.num_rows) for entry in kept]
    if mixture.kind == "balanced":
        parts = [part ** (1 - mixture.temperature) for part in parts]
    elif mixture.kind == "replay" or (mixture.kind == "shares" and mixture.unit == "tokens"):
        parts = _num_tokens(kept, recipe, model, reporter)
    return [part * len(parts) / sum(parts) for part in parts]


def _num_tokens(kept: Sequence[Kept], recipe: Recipe, model: Model, reporter: Reporter) -> list[float]:
    """Tokens of each source of the buffer, as the run will read it."""
    from ftcli.data.prepare import prepare
    from ftcli.training.assemble import cache_folder

    sources = tuple(entry.source for entry in kept)
    data = recipe.data.model_copy(update={"train": sources, "evaluation": (), "holdout": 0.0, "mixture": Replay()})
    found = prepare(
        data, model.load_tokenizer(), cache_folder=cache_folder(), progress=reporter, formats=recipe.objective.formats
    )  # fmt: skip
    return [float(max(1, store.report.num_tokens)) for store in found.train]
