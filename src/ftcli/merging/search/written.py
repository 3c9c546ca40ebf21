"""From the parameters that a search has found to an ordinary merge recipe, which the engine writes to disk and proves."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftcli.merging.engine import Say
from ftcli.merging.outcome import MergeOutcome, carry_out_plan
from ftcli.merging.plan import Plan, plan_merge
from ftcli.merging.recipe import load_merge_recipe
from ftcli.recipe.yaml import dump

Document = dict[str, Any]


def linear_document(models: Sequence[str], weights: Sequence[float]) -> Document:
    """A weighted average as a merge recipe; what has weight 0 is left out."""
    used = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight != 0]
    return {"merge_method": "linear", "models": [{"model": model, "parameters": {"weight": weight}} for model, weight in used]}


def method_document(method: str, models: Sequence[str], base: str | None, settings: Mapping[str, Any], outside: Layers) -> Document:
    """Any merge method with these parameters as a merge recipe.

    Args:
        settings: values by name; one for each model in a list, and of grouped weights a list of those.
    """
    document: Document = {"merge_method": method}
    if base is not None:
        document["base_model"] = base
    shared = {name: value for name, value in settings.items() if not isinstance(value, list)}
    document["models"] = [
        {"model": model, "parameters": {name: outside.value(value, index) for name, value in settings.items() if isinstance(value, list)}}
        for index, model in enumerate(models)
    ]
    return document | ({"parameters": shared} if shared else {})


class Layers:
    """How groups of layers are said in a merge recipe."""

    def __init__(self, num_layers: int, num_groups: int, first_names: Sequence[str]) -> None:
        """
        Args:
            first_names: tensors outside the layers that are in the first group.
        """
        self.bounds = [-(-group * num_layers // num_groups) for group in range(num_groups + 1)]
        self.first_names = first_names

    def value(self, values: list[Any], model: int) -> Any:
        """A model's value, or its values for the groups of layers."""
        if not isinstance(values[0], list):
            return values[model]
        own = [group[model] for group in values]
        if len(set(own)) == 1:
            return own[0]
        entries: list[dict[str, Any]] = [
            {"value": value, "layers": [first, last]} for value, first, last in zip(own, self.bounds, self.bounds[1:], strict=False)
        ]
        if self.first_names:
            entries.append({"value": own[0], "regex": f"^({'|'.join(re.escape(name) for name in self.first_names)})$"})
        return [*entries, {"value": own[-1]}]


def planned(document: Document, recipe_path: Path, output: Path | None, dtype: str | None, threads: int) -> Plan:
    """The plan of a recipe that ftcli made itself; its relative paths count from the folder of `recipe_path`.

    Raises:
        RecipeError: the models do not fit each other.
    """
    text = dump(document | ({} if dtype is None else {"dtype": dtype}))
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / recipe_path.name
        written.write_text(text, encoding="utf-8")
        recipe = load_merge_recipe(written)
    return plan_merge(replace(recipe, path=recipe_path), output, threads=threads)


def write_merge(
    document: Document, recipe_path: Path, output: Path, *, dtype: str | None, threads: int | None, verify: bool, say: Say | None
) -> MergeOutcome:  # fmt: skip
    """Merge as `document` says, into a model folder at `output`, whole and proven."""
    number = threads or len(os.sched_getaffinity(0))
    plan = planned(document, recipe_path, output, dtype, number)
    return carry_out_plan(plan, output, threads=number, resume=False, verify=verify, say=say)
