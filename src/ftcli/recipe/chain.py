"""A chain: one recipe of several stages, each an ordinary run that begins where the one before it ended."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ftcli.data.names import Listed, names_apart, rows_of
from ftcli.data.settings import Data, EvaluationSource
from ftcli.errors import Problem, RecipeError
from ftcli.methods import Method
from ftcli.models.settings import Model
from ftcli.objectives import Objective
from ftcli.recipe.checks import check_relations
from ftcli.recipe.explain import Finding, value_at
from ftcli.recipe.left_by_stages import held_to_the_base, moved, not_left
from ftcli.recipe.load import LoadedRecipe, load_document
from ftcli.recipe.recipe import Recipe, Tracker
from ftcli.recipe.same_text import Fit, fit_of, with_fit
from ftcli.recipe.train import Every, Train
from ftcli.recipe.write import resolved_yaml
from ftcli.recipe.yaml import YamlError, parse
from ftcli.spec import FolderName, LocalPath, Spec

Beginning = Literal["keep", "stack", "merge"]
SECTIONS = ("data", "method", "objective", "train", "every")
_OF_A_KIND = ("method", "objective")
_EXTENTS = {"epochs", "steps", "max_tokens"}
# What made the first stage's base is in the later ones' base already.
_OF_THE_FIRST_BASE = ("base", "init", "revision", "tokenizer", "add_tokens", "grow", "rope")
STAGES, MERGED, TITLE = "stages", "merged", "ftcli chain"
TOKENS_FILE, SUMMARY_FILE = "added_tokens.txt", "chain.json"


class Stage(Spec):
    """One run of a chain: what it says takes the place of what the chain says for all, key by key; a method or an objective whole."""

    name: FolderName
    """Names the stage and its folder."""
    data: Data | None = None
    """What is seen in this stage."""
    method: Method | None = None
    """Which weights move in this stage."""
    objective: Objective | None = None
    """What is minimised in this stage."""
    train: Train | None = None
    """How far and how fast."""
    every: Every | None = None
    """When to log, evaluate and save."""
    begin: Beginning | None = None
    """What becomes of the adapter of the stage before: `keep` trains it on, `stack` freezes it below a new one, `merge` folds it into the
    base. The default keeps it where the method is the same, and merges it where it is another; what `stack` has left can be merged or
    stacked on. A whole model is always gone on with."""


class Chain(Spec):
    """Several stages over one base, in order: domain text, task text, instructions, or any other."""

    version: Literal[1]
    """Version of the recipe language."""
    name: FolderName
    """Names the chain and its folder."""
    model: Model
    """The base model of the first stage."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """The runs, each from the last."""
    data: Data | None = None
    """For stages that have none of their own."""
    method: Method | None = None
    """For stages that have none of their own."""
    objective: Objective | None = None
    """For stages that have none of their own."""
    train: Train | None = None
    """For stages that have none of their own."""
    every: Every | None = None
    """For stages that have none of their own."""
    evaluation: tuple[EvaluationSource, ...] = ()
    """What every stage measures beside its own and all earlier stages' evaluation."""
    trackers: tuple[Tracker, ...] = ()
    """Where metrics go beside metrics.jsonl; each is an extra."""
    output: LocalPath | None = None
    """The chain's folder; the default is runs/<name> in the current folder."""


@dataclass(frozen=True, slots=True)
class ChainStage:
    """A stage as it is run."""

    name: str
    loaded: LoadedRecipe
    begin: Literal["base", "model", "keep", "stack", "merge"]
    """`base` is the first stage's, `model` goes on with a whole model."""


@dataclass(frozen=True, slots=True)
class LoadedChain:
    """A chain and the recipes of its stages."""

    chain: Chain
    text: str
    """The file as it is on disk, without the overrides."""
    path: Path
    folder: Path
    stages: tuple[ChainStage, ...]


def is_chain(path: Path) -> bool:
    """Does the file have stages? What cannot be read has none, and is refused by whoever loads it."""
    try:
        return path.is_file() and STAGES in parse(path.read_text(encoding="utf-8")).data
    except (YamlError, UnicodeDecodeError, OSError):
        return False


def load_chain(path: Path, overrides: Sequence[str] = (), *, suffix: str = "") -> LoadedChain:
    """The chain at `path` with `overrides` applied, and a recipe for every stage.

    Args:
        suffix: of the chain's folder.

    Raises:
        RecipeError: it cannot be read, or something in it is wrong; names every problem with its line.
    """
    chain, text, document = load_document(path, Chain, TITLE, check_chain, overrides)
    own = Path(chain.output) if chain.output is not None else Path.cwd() / "runs" / chain.name
    folder = own.with_name(f"{own.name}{suffix}")
    stages = tuple(_resolved(chain, document, path, folder, own))
    return LoadedChain(chain, text, path, folder, stages)


def on_first_base(loaded: LoadedChain) -> Iterator[tuple[str, LoadedRecipe]]:
    """Name and recipe of every stage as if it began at the chain's base: what can be checked before anything is trained."""
    for index, stage in enumerate(loaded.stages):
        model, method = loaded.chain.model, stage.loaded.recipe.method
        # The proof of the first stage is enough; but what was grown in it is what a later one trains.
        if index > 0 and not getattr(method, "grown", False):
            model = model.model_copy(update={"grow": None})
        objective = held_to_the_base(stage.loaded.recipe, loaded.chain.model, loaded.folder / STAGES, is_first=index == 0)
        recipe = stage.loaded.recipe.model_copy(update={"model": model, "init_from": None, "objective": objective})
        yield stage.name, replace(stage.loaded, recipe=recipe)


def stage_folder(folder: Path, index: int, name: str) -> Path:
    """Where the run of the stage counted from 0 is."""
    return folder / STAGES / f"{index + 1:02d}-{name}"


def _resolved(chain: Chain, document: dict[str, Any], path: Path, folder: Path, own: Path) -> Iterator[ChainStage]:
    """
    Args:
        own: the folder that the recipe's paths are of, where it is to be trained in another.
    """
    model = dict(document["model"])
    measured = _measured(chain, document, path)
    previous: Recipe | None = None
    stages: list[ChainStage] = []
    for index, stage in enumerate(chain.stages):
        sections, _ = _sections(document, index)
        sections["data"] = {**sections["data"], "evaluation": measured[index]}
        found: dict[str, Any] = {"version": 1, "name": stage.name, "model": model, **sections, "trackers": list(chain.trackers)}
        found["output"] = str(stage_folder(folder, index, stage.name).resolve())
        begin: Any = "base"
        if previous is not None:
            before = stage_folder(folder, index - 1, previous.name)
            begin = _beginning(previous, _recipe(found, path), stage.begin)
            if begin == "merge" and not previous.method.merges:
                what = f"begins on `{previous.name}` merged, and an adapter of kind `{previous.method.kind}` cannot be merged"
                problem = Problem(f"{STAGES}.{index}", what, f"let `{previous.name}` be the last stage, or train it by another method")
                raise RecipeError(f"recipe `{path}` has 1 problem", [problem])
            if begin in ("model", "merge"):
                left = {key: value for key, value in model.items() if key not in _OF_THE_FIRST_BASE}
                model = {**left, "base": str(before / ("model" if begin == "model" else MERGED))}
                found["model"] = model
            else:
                found["init_from"] = {"path": str(before), "adapter": begin}
                found["model"] = model = _with_tokens_of(model, before)
        previous = moved(_recipe(found, path), own / STAGES, folder / STAGES)
        runs = [(stage_folder(folder, number, done.name), done.loaded.recipe, str(done.begin)) for number, done in enumerate(stages)]
        if problems := list(not_left(previous, begin, runs, folder / STAGES, MERGED)):
            raise RecipeError(f"recipe `{path}` has {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems)
        loaded = LoadedRecipe(previous, resolved_yaml(previous), path, found)
        stages.append(ChainStage(stage.name, loaded, begin))
        yield stages[-1]


def _with_tokens_of(model: dict[str, Any], before: Path) -> dict[str, Any]:
    """The model with the tokens that the stage before has found, where each stage would look for its own."""
    settings = model.get("add_tokens")
    if not isinstance(settings, dict) or settings.get("mine") is None:
        return model
    # What was described has its row by now, as all of them.
    kept = {key: value for key, value in settings.items() if key not in ("mine", "descriptions")}
    return {**model, "add_tokens": {**kept, "file": str(before / TOKENS_FILE)}}


def _recipe(found: dict[str, Any], path: Path) -> Recipe:
    return Recipe.model_validate_json(json.dumps(found), context={"folder": path.resolve().parent})


def _measured(chain: Chain, document: dict[str, Any], path: Path) -> list[list[dict[str, Any]]]:
    """What each stage measures: its own sources, then those of the chain and of all earlier stages that its objective can measure.

    Raises:
        RecipeError: two sources have one name, or one source two.
    """
    recipes = [_alone(chain, document, index, path) for index in range(len(chain.stages))]
    common = [Listed(source, "the chain", f"evaluation.{number}") for number, source in enumerate(chain.evaluation)]
    own = [_own(chain, document, index, recipe.data) for index, recipe in enumerate(recipes)]
    names, problems = names_apart([*common, *itertools.chain.from_iterable(own)])
    for listed in own:
        problems += _listed_twice(listed)
    if problems:
        raise RecipeError(f"recipe `{path}` has {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems)
    # A format that is not given is found by the first stage.
    known = {rows_of(one.entry): (one.entry, recipes[0].objective.formats) for one in common}
    fits: dict[str, Fit] = {}
    found = []
    for recipe, listed in zip(recipes, own, strict=True):
        formats, mine = recipe.objective.formats, {rows_of(one.entry): one.entry for one in listed}
        kept = {rows: _retained(entry) for rows, (entry, of) in known.items() if rows not in mine and _is_readable(entry, of, formats)}
        measured = {**mine, **kept}
        fits = {**{rows: fit_of(entry, recipe) for rows, entry in measured.items()}, **fits}
        found.append([_document(with_fit(entry, recipe, fits[rows]), names[rows]) for rows, entry in measured.items()])
        known |= {rows: (entry, formats) for rows, entry in mine.items() if rows not in known}
    return found


def _alone(chain: Chain, document: dict[str, Any], index: int, path: Path) -> Recipe:
    """A stage as a recipe that knows nothing of the others."""
    sections, _ = _sections(document, index)
    return _recipe({"version": 1, "name": chain.stages[index].name, "model": document["model"], **sections}, path)


def _own(chain: Chain, document: dict[str, Any], index: int, data: Data) -> list[Listed]:
    """What a stage itself lists, or the rows that it holds out by itself."""
    owner = f"stage `{chain.stages[index].name}`"
    held_out = None if chain.evaluation else data.held_out()
    # In another stage the base would write other texts.
    if held_out is not None and held_out.source.kind != "self":
        return [Listed(held_out, owner, None)]
    is_common = value_at(document[STAGES][index], ("data", "evaluation")) is None
    key = "data.evaluation" if is_common else f"{STAGES}.{index}.data.evaluation"
    return [Listed(source, owner, f"{key}.{number}") for number, source in enumerate(data.evaluation)]


def _listed_twice(listed: Sequence[Listed]) -> Iterator[Problem]:
    rows = [rows_of(one.entry) for one in listed]
    for number, one in enumerate(listed):
        if rows[number] in rows[:number]:
            yield Problem(str(one.where), f"{one.owner} lists these rows twice", "remove one of the two")


def _is_readable(entry: EvaluationSource, of: frozenset[str], formats: frozenset[str]) -> bool:
    """Can an objective that learns from `formats` measure rows whose format was found by one that learns from `of`, or was given?"""
    return of <= formats if entry.format is None else entry.format.kind in formats


def _retained(entry: EvaluationSource) -> EvaluationSource:
    return entry.model_copy(update={"role": "retained"})


def _document(entry: EvaluationSource, name: str) -> dict[str, Any]:
    return {**entry.model_dump(mode="json", exclude_unset=True), "name": name, "role": entry.role}


def _beginning(previous: Recipe, own: Recipe, wanted: Beginning | None) -> str:
    if previous.method.artefact == "model":
        return "model"
    return wanted or ("keep" if own.method == previous.method else "merge")


def _sections(document: dict[str, Any], index: int) -> tuple[dict[str, Any], set[str]]:
    """The sections of a stage, and which of them are its own."""
    stage = document[STAGES][index]
    own = {key for key in SECTIONS if stage.get(key) is not None}
    return {key: _section(document.get(key), stage.get(key), key) for key in SECTIONS if key in own or document.get(key) is not None}, own


def _section(common: Any, own: Any, section: str) -> Any:
    """A stage's section: what has a kind is replaced whole, of the others each key is the stage's or else the chain's."""
    if own is None or common is None or section in _OF_A_KIND or not isinstance(own, dict) or not isinstance(common, dict):
        return common if own is None else own
    left_out = _EXTENTS if _EXTENTS & own.keys() else set()
    return {**{key: value for key, value in common.items() if key not in left_out}, **own}


def check_chain(document: dict[str, Any]) -> list[Finding]:
    """Every contradiction within a stage and between stages."""
    stages = document.get(STAGES)
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return []
    findings = [finding for index in range(len(stages)) for finding in (*_within(document, index), *_between(document, index))]
    return list({finding[:2]: finding for finding in findings}.values())


def _within(document: dict[str, Any], index: int) -> Iterator[Finding]:
    """What is wrong with the stage as a recipe."""
    sections, own = _sections(document, index)
    if "data" not in sections:
        yield (STAGES, index), "missing key `data`", "give it here, or once for all stages beside `stages`"
        return
    model = document.get("model")
    if index > 0:
        # It may have been grown in a stage before where the chain says so.
        grow, base = (value_at(document, ("model", key)) for key in ("grow", "base"))
        model = {"base": "the stage before" if grow is not None else base or "builtin:random"}
    for path, what, hint in check_relations({**sections, "model": model}):
        is_own = bool(path) and path[0] in own and (len(path) == 1 or value_at(document[STAGES][index], path) is not None)
        yield (STAGES, index, *path) if is_own else path, what, hint


def _between(document: dict[str, Any], index: int) -> Iterator[Finding]:
    """What does not fit the stages before."""
    stages = document[STAGES]
    name, begin = stages[index].get("name"), stages[index].get("begin")
    if name is not None and any(stage.get("name") == name for stage in stages[:index]):
        yield (STAGES, index, "name"), f"another stage is called `{name}`, too", "names of stages differ"
    if index == 0:
        if begin is not None:
            yield (STAGES, index, "begin"), "the first stage begins at `model`", "remove it"
        return
    kind, before = (_method_kind(document, number) for number in (index, index - 1))
    if begin == "keep" and kind != before:
        yield (STAGES, index, "begin"), f"`{kind}` cannot train an adapter of `{before}` on", "merge"
    if stages[index - 1].get("begin") == "stack" and begin in (None, "keep") and _method(document, index) == _method(document, index - 1):
        what = "the stage before leaves an adapter of its own rank and the earlier one's together, which this method cannot train on"
        yield (STAGES, index), what, "`begin: merge`, or `stack` again"


def _method_kind(document: dict[str, Any], index: int) -> Any:
    method = _method(document, index)
    return method.get("kind") if isinstance(method, dict) else Recipe.model_fields["method"].default.kind


def _method(document: dict[str, Any], index: int) -> Any:
    return _sections(document, index)[0].get("method")
