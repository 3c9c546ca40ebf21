"""Merge recipes that look for the best merge: what they may say, read strictly.

```yaml
merge_method: greedy_soup            # or wise_ft with `evaluate`, search, learned_weights
models: [runs/a, runs/b, runs/c]
evaluate:
  metric: loss
  sources:
    - {name: orders, source: {kind: file, path: orders-test.jsonl}}
    - {name: stories, source: {kind: builtin, name: stories, split: test}, role: retained}
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from ftcli.data.settings import EvaluationSource
from ftcli.errors import Problem, RecipeError, did_you_mean
from ftcli.recipe.yaml import Document, describe, where
from ftcli.spec import ExpandedName, LocalPath, Spec

LossMetric = Literal["loss", "perplexity", "bits_per_byte"]
AnswerMetric = Literal["exact-match", "json-match", "number-match"]
Dtype = Literal["float32", "bfloat16", "float16"]
SearchedMethod = Literal[
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della_linear", "della", "breadcrumbs", "breadcrumbs_ties"
]  # fmt: skip


class Evaluate(Spec):
    """What decides between merges."""

    sources: tuple[EvaluationSource, ...] = Field(min_length=1)
    """Held-out rows, as in a training recipe's `data.evaluation`."""
    metric: LossMetric | AnswerMetric = "loss"
    """What is measured on each source; losses as small as possible, scores of generated answers as large as possible."""
    weights: dict[str, float] = {}
    """How much each source counts, by its name; the default is 1 for every target and 0 for what is `role: retained`."""
    max_length: int = Field(default=1024, ge=2)
    """Longest example in tokens."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Generated answers are cut here."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Token budget of one forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure."""


class GreedySoup(Spec):
    """Average models from the best on, keeping each that does not make the average worse."""

    merge_method: Literal["greedy_soup"]
    """Names this recipe's kind."""
    models: tuple[ExpandedName, ...] = Field(min_length=2)
    """Folders, runs, builtin:NAME, hub ids, or any of them with `+ADAPTER`."""
    evaluate: Evaluate
    """What decides."""
    dtype: Dtype | None = None
    """Of the weights written; the default is the first model's."""


class WiseFt(Spec):
    """Measure the straight line from a base to a model, and take the best point."""

    merge_method: Literal["wise_ft"]
    """Names this recipe's kind."""
    base_model: ExpandedName
    """Alpha 0."""
    models: tuple[ExpandedName, ...] = Field(min_length=1, max_length=1)
    """Alpha 1."""
    evaluate: Evaluate
    """What decides."""
    alphas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = tuple(round(step / 10, 1) for step in range(11))
    """The points to measure; the base and the model, 0 and 1, are measured in any case."""
    dtype: Dtype | None = None
    """Of the weights written; the default is the base's."""


class SearchSettings(Spec):
    """Where and how to look."""

    method: SearchedMethod = "linear"
    """The merge method whose parameters vary."""
    ranges: dict[str, tuple[float, float]] = {"weight": (0.0, 1.0)}
    """Lowest and highest value of each parameter that varies."""
    fixed: dict[str, float | bool | str] = {}
    """Parameters that do not."""
    algorithm: Literal["cma-es", "random"] = "cma-es"
    """`cma-es` learns from what it has seen; `random` does not."""
    budget: int = Field(default=40, ge=1)
    """Most evaluations; a larger value finds better merges and takes longer."""
    layer_groups: int = Field(default=1, ge=1)
    """So many groups of layers have weights of their own; a larger value needs a larger budget."""


class Search(Spec):
    """Look for the parameters of a merge method."""

    merge_method: Literal["search"]
    """Names this recipe's kind."""
    models: tuple[ExpandedName, ...] = Field(min_length=2)
    """Folders, runs, builtin:NAME, hub ids, or any of them with `+ADAPTER`."""
    base_model: ExpandedName | None = None
    """What methods on changes compare with."""
    evaluate: Evaluate
    """What decides."""
    search: SearchSettings = SearchSettings()
    """Where and how to look."""
    seed: int = Field(default=0, ge=0)
    """The same seed asks for the same merges in the same order."""
    dtype: Dtype | None = None
    """Of the weights written; the default is the base's or first model's."""


class LearnedWeights(Spec):
    """Learn how much each model counts in each group of layers, by gradient on the evaluation sources' loss."""

    merge_method: Literal["learned_weights"]
    """Names this recipe's kind."""
    models: tuple[ExpandedName, ...] = Field(min_length=1)
    """Folders, runs, builtin:NAME, hub ids, or any of them with `+ADAPTER`."""
    base_model: ExpandedName
    """What the models' changes are added to."""
    evaluate: Evaluate
    """Whose loss is made small; it should not be what the result is judged by in the end."""
    steps: int = Field(default=60, ge=1)
    """Updates of the coefficients."""
    lr: float = Field(default=0.05, gt=0)
    """Learning rate of the coefficients (Adam)."""
    layer_groups: int = Field(default=4, ge=1)
    """So many groups of layers have coefficients of their own."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens of one update."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the rows."""
    dtype: Dtype | None = None
    """Of the weights written; the default is the base's."""


class Domain(Spec):
    """An adapter, and what it is for."""

    model: ExpandedName
    """The adapter's folder, or a run's."""
    texts: LocalPath | None = None
    """A text file, or rows with texts, of its domain; the default is the run's own training data."""


class AdapterSoup(Spec):
    """Average the adapters whose domains are nearest to a text."""

    merge_method: Literal["adapter_soup"]
    """Names this recipe's kind."""
    models: tuple[Domain, ...] = Field(min_length=1)
    """The adapters to choose from."""
    base_model: ExpandedName | None = None
    """Whose hidden states tell how near domains are; the default is the adapters' own base."""
    texts: LocalPath
    """A text file, or rows with texts, of the new domain."""
    k: int = Field(default=3, ge=1)
    """How many adapters are averaged."""
    rows: int = Field(default=64, ge=1)
    """How many rows of each domain are read."""
    dtype: Dtype = "float32"
    """Of the adapter written."""


AnySearch = GreedySoup | WiseFt | Search | LearnedWeights | AdapterSoup
_ADAPTER: TypeAdapter[AnySearch] = TypeAdapter(Annotated[AnySearch, Field(discriminator="merge_method")])


def read_search_recipe(document: Document, path: Path) -> AnySearch:
    """The search that a document asks for.

    Raises:
        RecipeError: something in it is wrong; names every problem with its line.
    """
    data = _normal(document.data)
    try:
        return _ADAPTER.validate_json(json.dumps(data), context={"folder": path.resolve().parent})
    except ValidationError as error:
        problems = [_problem(found, document, data) for found in error.errors(include_url=False)]
        problems += [problem for _, problem in document.problems]
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        raise RecipeError(f"merge recipe `{path}` has {count}", problems) from None


def _normal(data: Mapping[str, Any]) -> dict[str, Any]:
    """Models in the long form of merge recipes become their names; an adapter soup's names become the long form."""
    models = data.get("models")
    if not isinstance(models, list):
        return dict(data)
    if data.get("merge_method") == "adapter_soup":
        return {**data, "models": [{"model": model} if isinstance(model, str) else model for model in models]}
    return {**data, "models": [model["model"] if isinstance(model, dict) and set(model) == {"model"} else model for model in models]}


def _problem(found: Any, document: Document, data: Mapping[str, Any]) -> Problem:
    """What pydantic says, in ftcli's words."""
    path = tuple(part for part in found["loc"] if _is_written(part, data))
    kind, value = found["type"], found.get("input")
    place = document.place(path)
    said = where(path, place)
    if kind == "extra_forbidden":
        return Problem(said, "unknown key", did_you_mean(str(path[-1]), _field_names()))
    if kind == "missing":
        return Problem(where(path[:-1], document.place(path[:-1])), f"missing key `{found['loc'][-1]}`")
    if kind == "value_error":
        return Problem(said, str(found["ctx"]["error"]))
    message = str(found["msg"]).replace("'", "`")
    return Problem(said, f"found {describe(value)}, allowed: {message[:1].lower()}{message[1:]}")


def _is_written(part: str | int, data: Mapping[str, Any]) -> bool:
    """Is it part of the path in the file? pydantic adds the names of choices."""
    return part != data.get("merge_method") and not (isinstance(part, str) and part in ("file", "hub", "builtin", "chat", "text"))


def _field_names() -> list[str]:
    kinds = (*get_args(AnySearch), Evaluate, SearchSettings, Domain, EvaluationSource)
    return sorted({name for kind in kinds for name in kind.model_fields})
