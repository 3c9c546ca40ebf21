"""Merge recipes whose result is an adapter: read strictly, and run.

```yaml
merge_method: lora_ties
models:
  - {model: runs/math, parameters: {weight: 0.6, density: 0.5}}
  - {model: runs/code, parameters: {weight: 0.4, density: 0.5}}
parameters: {rank: 32}          # or energy: 0.99
base_model: builtin:tiny        # where the adapters do not name the same, or DoRA and whole modules need it
```
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftcli.errors import Problem, RecipeError, did_you_mean
from ftcli.merging.lora.adapter import Adapter, open_adapter
from ftcli.merging.lora.averages import AdapterAverage, average_adapters
from ftcli.merging.lora.merge import CONCAT, DENSE, SVD, AdapterMerge, merge_adapters
from ftcli.merging.methods.method import REQUIRED, Parameter
from ftcli.merging.numbers import DTYPES
from ftcli.models.locate import model_folder
from ftcli.recipe.yaml import KeyPath, dotted

AVERAGE = "adapter_average"
METHODS = (CONCAT, SVD, *DENSE, AVERAGE)
"""Merge methods that take adapters and give an adapter."""
_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "seed")
_WEIGHT = Parameter("weight", 1.0, "share of the adapter", per_model=True)
_RANK = Parameter("rank", None, "largest rank of the result", "whole", minimum=1)
_ENERGY = Parameter("energy", None, "smallest share of each module's energy that is kept", minimum=0, maximum=1)
_SCALE = Parameter("scale", "linear", "average scales, or their logarithms", "choice", choices=("linear", "log"))


@dataclass(frozen=True)
class AdapterRecipe:
    """A merge of adapters, opened and checked from headers and JSON alone."""

    job: AdapterMerge | AdapterAverage

    def plan(self) -> list[str]:
        """What is going to be done, in lines for people."""
        job = self.job
        lines = [f"{adapter.name}: {adapter.kind}, {len(adapter.tensors)} tensors, weight {weight:g}" for adapter, weight in self._parts()]
        if isinstance(job, AdapterMerge):
            lines.append(f"{job.method}: {len(job.modules)} modules, {len(job.full_tensors)} tensors in full, written as {job.dtype}")
        return lines

    def _parts(self) -> list[tuple[Adapter, float]]:
        return list(zip(self.job.adapters, self.job.weights, strict=True))

    def run(self, output: Path) -> dict[str, Any]:
        """Merge, and write the adapter at `output`.

        Returns:
            The report as JSON has it, with `line`.
        """
        if isinstance(self.job, AdapterAverage):
            report = average_adapters(self.job, output)
            return {**report, "line": f"average of {len(self.job.adapters)} {report['kind']} adapters, {report['tensors']} tensors"}
        merged = merge_adapters(self.job, output)
        return {**merged.to_json(), "line": merged.line()}


def is_adapter_recipe(data: Mapping[str, Any]) -> bool:
    """Does a merge recipe's document ask for a method that merges adapters?"""
    name = data.get("merge_method")
    return isinstance(name, str) and (name in METHODS or name.startswith(("lora_", "adapter_av")))


def read_adapter_recipe(data: Mapping[str, Any], folder: Path) -> AdapterRecipe:
    """The merge that a document asks for.

    Args:
        data: the parsed YAML.
        folder: the recipe's; relative paths count from it.

    Raises:
        RecipeError: something in it is wrong; names every problem.
        RequestError: the adapters cannot be merged so.
    """
    recipe = _Reader(data, folder).recipe()
    recipe.job.check()
    return recipe


class _Reader:
    """Turns the document into a merge, and collects what is wrong on the way."""

    def __init__(self, data: Mapping[str, Any], folder: Path) -> None:
        self.data, self.folder = data, folder
        self.problems: list[Problem] = []

    def wrong(self, path: KeyPath, what: str, hint: str | None = None) -> None:
        self.problems.append(Problem(dotted(path), what, hint))

    def recipe(self) -> AdapterRecipe:
        name = str(self.data.get("merge_method"))
        for key in self.data:
            if key not in _KEYS:
                self.wrong((key,), "unknown key", did_you_mean(key, _KEYS) or f"keys here: {', '.join(_KEYS)}")
        if name not in METHODS:
            self.wrong(("merge_method",), f"unknown method `{name}`", did_you_mean(name, METHODS) or f"methods: {', '.join(METHODS)}")
            raise self._error()
        allowed = self._allowed(name)
        shared = self._parameters(self.data.get("parameters"), ("parameters",), allowed, is_shared=True)
        entries = self._entries()
        own = [self._own(entry, index, allowed) for index, entry in enumerate(entries)]
        fewest = DENSE[name].num_models[0] if name in DENSE else 1
        if len(entries) < fewest:
            self.wrong(("models",), f"`{name}` merges at least {fewest} adapters, found {len(entries)}")
        base, dtype, seed = self._base(), self._dtype(), self.data.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            self.wrong(("seed",), f"found `{seed}`, allowed: a whole number")
        if self.problems:
            raise self._error()
        adapters = tuple(open_adapter(str(entry["model"]), self._located(str(entry["model"]))) for entry in entries)
        settings = self._settings(allowed, shared, own)
        if name == AVERAGE:
            return AdapterRecipe(AdapterAverage(adapters, settings["weight"], base, settings["scale"], dtype))
        rank, energy = settings.pop("rank", None), settings.pop("energy", None)
        job = AdapterMerge(name, adapters, settings, base, rank, energy, dtype, int(seed))
        fault = DENSE[name].fault(settings) if name in DENSE else None
        if fault is not None:
            self.wrong(("parameters",), fault)
            raise self._error()
        return AdapterRecipe(job)

    def _allowed(self, name: str) -> dict[str, Parameter]:
        if name == AVERAGE:
            found: tuple[Parameter, ...] = (_WEIGHT, _SCALE)
        elif name == CONCAT:
            found = (_WEIGHT,)
        elif name == SVD:
            found = (_WEIGHT, _RANK, _ENERGY)
        else:
            # one module at a time: nothing is looked at over all of them
            dense = (replace(each, choices=("tensor",)) if each.name == "scope" else each for each in DENSE[name].parameters)
            found = (*dense, _RANK, _ENERGY)
        return {parameter.name: parameter for parameter in found}

    def _entries(self) -> list[dict[str, Any]]:
        value = self.data.get("models")
        if not isinstance(value, list) or not value:
            self.wrong(("models",), "there are no adapters", "models: [{model: ADAPTER_OR_RUN, parameters: {weight: 0.5}}, ...]")
            return []
        entries = []
        for index, entry in enumerate(value):
            entry = {"model": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
                self.wrong(("models", index), "missing key `model`", "the folder of an adapter, or of a run that has one")
                continue
            for key in entry:
                if key not in ("model", "parameters"):
                    self.wrong(("models", index, key), "unknown key", did_you_mean(key, ("model", "parameters")))
            entries.append(entry)
        return entries

    def _own(self, entry: Mapping[str, Any], index: int, allowed: Mapping[str, Parameter]) -> dict[str, Any]:
        return self._parameters(entry.get("parameters"), ("models", index, "parameters"), allowed, is_shared=False)

    def _parameters(self, value: Any, path: KeyPath, allowed: Mapping[str, Parameter], *, is_shared: bool) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong(path, f"found `{value}`, allowed: a mapping")
            return {}
        for name, setting in value.items():
            parameter = allowed.get(name)
            if parameter is None:
                hint = did_you_mean(name, list(allowed)) or f"parameters here: {', '.join(allowed)}"
                self.wrong((*path, name), "unknown parameter", hint)
            elif not is_shared and not parameter.per_model:
                self.wrong((*path, name), f"`{name}` is one for all adapters", "move it to `parameters` at the top level")
            elif (fault := parameter.fault(setting)) is not None:
                self.wrong((*path, name), fault)
        return value

    def _settings(self, allowed: Mapping[str, Parameter], shared: Mapping[str, Any], own: list[dict[str, Any]]) -> dict[str, Any]:
        """Every parameter's value; one for each adapter where they have their own."""
        settings: dict[str, Any] = {}
        for name, parameter in allowed.items():
            default = shared.get(name, parameter.default)
            values = [each.get(name, default) for each in own] if parameter.per_model else [default]
            if any(value is REQUIRED for value in values):
                self.wrong(("models",), f"`{name}` has no default, and not every adapter has one", f"parameters: {{{name}: 0.5}}")
                raise self._error()
            settings[name] = tuple(values) if parameter.per_model else parameter.taken(default)
        return settings

    def _base(self) -> str | None:
        value = self.data.get("base_model")
        if value is not None and not isinstance(value, str):
            self.wrong(("base_model",), f"found `{value}`, allowed: builtin:NAME, a local folder, or a hub id")
        if not isinstance(value, str) or value.startswith("builtin:"):
            return value if isinstance(value, str) else None
        return str(self.folder / value) if os.path.isdir(self.folder / value) else value

    def _dtype(self) -> str:
        value = self.data.get("out_dtype", self.data.get("dtype", "float32"))
        if value not in DTYPES:
            self.wrong(("dtype",), f"found `{value}`, allowed: {', '.join(DTYPES)}")
        return str(value)

    def _located(self, reference: str) -> Path:
        path = Path(reference).expanduser()
        local = next((place for place in (self.folder / path, path) if os.path.exists(place)), None)
        return local if local is not None else model_folder(reference)

    def _error(self) -> RecipeError:
        number = len(self.problems)
        return RecipeError(f"the merge recipe has {number} problem{'s' if number != 1 else ''}", self.problems)
