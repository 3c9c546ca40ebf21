"""A chain: one recipe of several stages, each an ordinary run that begins where the one before it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ftcli.data.settings import Data, EvaluationSource
from ftcli.errors import Problem, RecipeError
from ftcli.methods import Method
from ftcli.models.settings import Model
from ftcli.objectives import Objective
from ftcli.recipe.checks import check_relations
from ftcli.recipe.explain import Finding, value_at
from ftcli.recipe.load import LoadedRecipe, load_document
from ftcli.recipe.recipe import Recipe, Tracker
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
TOKENS_FILE = "added_tokens.txt"


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
    base. The default keeps it where the method is the same, and merges it where it is another. A whole model is always gone on with."""


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
    folder = Path(chain.output) if chain.output is not None else Path.cwd() / "runs" / chain.name
    folder = folder.with_name(f"{folder.name}{suffix}")
    stages = tuple(_resolved(chain, document, path, folder))
    return LoadedChain(chain, text, path, folder, stages)


def on_first_base(loaded: LoadedChain) -> Iterator[tuple[str, LoadedRecipe]]:
    """Name and recipe of every stage as if it began at the chain's base: what can be checked before anything is trained."""
    for index, stage in enumerate(loaded.stages):
        model = loaded.chain.model if index == 0 else loaded.chain.model.model_copy(update={"grow": None})
        recipe = stage.loaded.recipe.model_copy(update={"model": model, "init_from": None})
        yield stage.name, replace(stage.loaded, recipe=recipe)


def stage_folder(folder: Path, index: int, name: str) -> Path:
    """Where the run of the stage counted from 0 is."""
    return folder / STAGES / f"{index + 1:02d}-{name}"


def _resolved(chain: Chain, document: dict[str, Any], path: Path, folder: Path) -> Iterator[ChainStage]:
    model, known = dict(document["model"]), list(document.get("evaluation", ()))
    previous: Recipe | None = None
    for index, stage in enumerate(chain.stages):
        sections, _ = _sections(document, index)
        own = list(sections["data"].get("evaluation", ()))
        sections["data"] = {**sections["data"], "evaluation": own + [_retained(source) for source in known if not _is_among(source, own)]}
        known += [source for source in own if not _is_among(source, known)]
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
        previous = _recipe(found, path)
        loaded = LoadedRecipe(previous, resolved_yaml(previous), path, found)
        yield ChainStage(stage.name, loaded, begin)


def _with_tokens_of(model: dict[str, Any], before: Path) -> dict[str, Any]:
    """The model with the tokens that the stage before has found, where each stage would look for its own."""
    settings = model.get("add_tokens")
    if not isinstance(settings, dict) or settings.get("mine") is None:
        return model
    return {**model, "add_tokens": {**{key: value for key, value in settings.items() if key != "mine"}, "file": str(before / TOKENS_FILE)}}


def _recipe(found: dict[str, Any], path: Path) -> Recipe:
    return Recipe.model_validate_json(json.dumps(found), context={"folder": path.resolve().parent})


def _retained(source: dict[str, Any]) -> dict[str, Any]:
    return {**source, "role": "retained"}


def _is_among(source: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    """Are the same rows there, whatever their role?"""
    return _retained(source) in map(_retained, others)


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
    model = document.get("model") if index == 0 else {"base": "the stage before"}
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


def _method_kind(document: dict[str, Any], index: int) -> Any:
    sections, _ = _sections(document, index)
    method = sections.get("method")
    return method.get("kind") if isinstance(method, dict) else Recipe.model_fields["method"].default.kind
