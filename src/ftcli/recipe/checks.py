"""What must hold between the keys of a recipe, as far as the recipe alone can tell.

Each check reads the document as it was written, so that it speaks up beside the typing errors, and says nothing about what is
missing or of the wrong type: validation does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from ftcli.data.settings import Data
from ftcli.methods import Method
from ftcli.methods.lora import Lora
from ftcli.recipe.explain import Finding, value_at
from ftcli.recipe.yaml import KeyPath


def check_relations(data: dict[str, Any]) -> list[Finding]:
    """Every contradiction between keys of the document."""
    checks = (
        _base_or_init,
        _grown_base,
        _some_targets,
        _one_extent,
        _replay,
        _regularize,
        _stream,
        _warmup,
        _something_to_evaluate,
        _prompt_fits,
        _names_differ,
        _answers_of_language_models,
    )
    return [finding for check in checks for finding in check(data)]


def check_following(data: dict[str, Any]) -> list[Finding]:
    """The same of a recipe to which a run that goes on from another adds what it replays."""
    sources = value_at(data, ("data", "train"))
    if not isinstance(sources, list):
        return check_relations(data)
    has_own = any(isinstance(source, dict) and source.get("role") == "replay" for source in sources)
    mixture = data["data"].get("mixture") or (None if has_own else {"kind": "replay"})
    with_buffer = {**data, "data": {**data["data"], "train": [*sources, {"role": "replay"}], "mixture": mixture}}
    alone = [*_replay(data), *_regularize(data)]
    found = [finding for finding in check_relations(data) if finding not in alone]
    return [*found, *_replay(with_buffer), *_regularize(with_buffer)]


def _base_or_init(data: dict[str, Any]) -> Iterator[Finding]:
    model = data.get("model")
    if not isinstance(model, dict):
        return
    base, init = model.get("base"), model.get("init")
    if base is None and init is None:
        yield ("model",), "neither `base` nor `init` is given", "`base: builtin:tiny`, a hub id, or a local folder"
    if base is not None and init is not None:
        yield ("model", "init"), "`base` and `init` are both given", "`base` starts from trained weights, `init` from random ones"
    if base is None and init is not None and model.get("tokenizer") is None:
        yield ("model", "init"), "`init` needs `model.tokenizer`", "`tokenizer: builtin:tiny`, a hub id, or a local folder"
    if model.get("revision") is not None and (base is None or str(base).startswith("builtin:")):
        yield ("model", "revision"), "`revision` is read for hub ids only", "remove it"


def _grown_base(data: dict[str, Any]) -> Iterator[Finding]:
    """What is grown is saved whole: an adapter would fit no model on disk."""
    kind = value_at(data, ("method", "kind")) or Lora.model_fields["kind"].default
    method = next((member for member in get_args(get_args(Method)[0]) if member.model_fields["kind"].default == kind), None)
    grow = value_at(data, ("model", "grow"))
    if grow is not None and method is not None and method.artefact == "adapter":
        what = f"a grown base is saved as a whole model, and method `{kind}` leaves an adapter"
        yield ("model", "grow"), what, "`method: {kind: freeze, grown: true}` trains what was added, `full` everything"
    # What else the base may be, was perhaps grown by an earlier run, which only its folder tells.
    is_new = value_at(data, ("model", "init")) is not None or str(value_at(data, ("model", "base"))).startswith("builtin:")
    if value_at(data, ("method", "grown")) is True and grow is None and is_new:
        yield ("method", "grown"), "the base is not grown", "`model.grow` says how"


def _some_targets(data: dict[str, Any]) -> Iterator[Finding]:
    if value_at(data, ("method", "target_modules")) == []:
        yield ("method", "target_modules"), "an empty list: nothing would be adapted", "`all-linear`, or names such as `[q_proj, v_proj]`"


def _one_extent(data: dict[str, Any]) -> Iterator[Finding]:
    """A run is so many epochs, steps or tokens long, not two of them."""
    given = [name for name in ("epochs", "steps", "max_tokens") if value_at(data, ("train", name)) is not None]
    for name in given[1:]:
        yield ("train", name), f"`{given[0]}` and `{name}` are both given", "keep one of the two"


def _replay(data: dict[str, Any]) -> Iterator[Finding]:
    """A share of new text needs sources of both roles, and what is weighed against nothing has no weight."""
    sources = value_at(data, ("data", "train"))
    if value_at(data, ("data", "mixture", "kind")) != "replay" or not isinstance(sources, list):
        return
    for role in ("new", "replay"):
        own = [index for index, source in enumerate(sources) if isinstance(source, dict) and source.get("role", "new") == role]
        if not own:
            yield ("data", "mixture"), f"kind `replay` needs a source with `role: {role}`", "give one, or another kind of mixture"
        if len(own) == 1 and sources[own[0]].get("weight", 1) != 1:
            hint = "leave it out; how much is replayed is `data.mixture.share_of_new`"
            yield ("data", "train", own[0], "weight"), f"there is no other source with `role: {role}` to be weighed against", hint
    steps = value_at(data, ("train", "steps"))
    if value_at(data, ("data", "mixture", "accounting")) == "add" and steps is not None:
        yield ("data", "mixture", "accounting"), "`add` is about `epochs` and `max_tokens`; `train.steps` counts every step", "remove one"


def _regularize(data: dict[str, Any]) -> Iterator[Finding]:
    """What holds the targets of a role, or is measured on them, needs a source of it."""
    listed, sources = (value_at(data, path) for path in (("objective", "regularize"), ("data", "train")))
    if not isinstance(listed, list) or not isinstance(sources, list):
        return
    roles = [source.get("role", "new") for source in sources if isinstance(source, dict)]
    for index, entry in enumerate(listed):
        if not isinstance(entry, dict) or entry.get("weight", 1) == 0:
            continue
        path, kind, role = ("objective", "regularize", index), entry.get("kind"), entry.get("on")
        if kind == "kl" and role in ("new", "replay") and role not in roles:
            yield (*path, "on"), f"no training source has `role: {role}`", "`on: all`, or a source of this role"
        if kind == "ewc" and entry.get("rows") is None and "replay" not in roles:
            hint = "give `rows: {source: ...}`: text of the kind to be kept"
            yield path, "no training source has `role: replay` to measure on", hint


def _stream(data: dict[str, Any]) -> Iterator[Finding]:
    """Where training begins before the last row is read, nothing can hang on how many rows there are."""
    if value_at(data, ("data", "mixture", "kind")) != "stream":
        return
    if value_at(data, ("train", "steps")) is None:
        yield ("data", "mixture"), "kind `stream` does not know how long an epoch is before it has begun", "give `train.steps`"
    sources, holdout = value_at(data, ("data", "train")), value_at(data, ("data", "holdout"))
    if not value_at(data, ("data", "evaluation")) and isinstance(sources, list) and len(sources) == 1 and holdout != 0:
        yield ("data", "mixture"), "kind `stream` cannot hold rows out of what it has not read", "give `data.evaluation`, or `holdout: 0`"
    if value_at(data, ("objective", "kind")) == "classification":
        yield ("data", "mixture"), "kind `stream` does not know all labels before it begins", "another kind of mixture"
    if value_at(data, ("method", "cache_frozen")):
        yield ("method", "cache_frozen"), "keeps what is seen again, and of a stream nobody knows what will be", "leave it out"


def _warmup(data: dict[str, Any]) -> Iterator[Finding]:
    path: KeyPath = ("train", "schedule", "warmup_steps")
    warmup, steps = value_at(data, path), value_at(data, ("train", "steps"))
    if warmup is not None and value_at(data, ("train", "schedule", "warmup_ratio")) is not None:
        yield path, "`warmup_steps` and `warmup_ratio` are both given", "keep one of the two"
    if isinstance(warmup, int) and isinstance(steps, int) and warmup > steps:
        yield path, f"the warm-up of {warmup} steps is longer than `train.steps` ({steps})", f"at most {steps}"


def _something_to_evaluate(data: dict[str, Any]) -> Iterator[Finding]:
    """Evaluation and what hangs on it need held-out rows, given or held out from the one training source."""
    sources, holdout = value_at(data, ("data", "train")), value_at(data, ("data", "holdout"))
    has_rows = bool(value_at(data, ("data", "evaluation"))) or (isinstance(sources, list) and len(sources) == 1 and holdout != 0)
    evaluate, early_stopping = value_at(data, ("every", "evaluate")), value_at(data, ("train", "early_stopping"))
    if evaluate is not None and not has_rows:
        yield ("every", "evaluate"), "there is nothing to evaluate", "give `data.evaluation`"
    if early_stopping is not None and not has_rows:
        yield ("train", "early_stopping"), "there is nothing to evaluate", "give `data.evaluation`"
    if early_stopping is not None and evaluate is None:
        yield ("train", "early_stopping"), "`early_stopping` needs evaluations during training", "give `every.evaluate`"


def _prompt_fits(data: dict[str, Any]) -> Iterator[Finding]:
    """Virtual tokens come before every example; more of them than an example may have is a slip."""
    max_length = value_at(data, ("data", "max_length"))
    limit = max_length if isinstance(max_length, int) else Data.model_fields["max_length"].default
    for name in ("prompt_length", "prefix_length"):
        length = value_at(data, ("method", name))
        if isinstance(length, int) and length > limit:
            what = f"{length} virtual tokens before examples of at most {limit} (`data.max_length`)"
            yield ("method", name), what, "tens of virtual tokens are usual"


def _names_differ(data: dict[str, Any]) -> Iterator[Finding]:
    for part in ("train", "evaluation"):
        sources = value_at(data, ("data", part))
        seen: dict[str, int] = {}
        for index, source in enumerate(sources if isinstance(sources, list) else ()):
            name = source.get("name") if isinstance(source, dict) else None
            if isinstance(name, str) and seen.setdefault(name, index) != index:
                yield ("data", part, index, "name"), f"`{name}` is the name of data.{part}.{seen[name]}, too", "give each its own name"


def _answers_of_language_models(data: dict[str, Any]) -> Iterator[Finding]:
    """A classifier answers with labels: there is nothing to generate."""
    sources = value_at(data, ("data", "evaluation"))
    if value_at(data, ("objective", "kind")) != "classification" or not isinstance(sources, list):
        return
    for index, source in enumerate(sources):
        if isinstance(source, dict) and source.get("generate") is not None:
            hint = "leave it out: accuracy and more are measured anyway"
            yield ("data", "evaluation", index, "generate"), "a classifier generates no answers", hint
