"""Averages of adapters that are no sums of products: IA3, bottleneck adapters, soft prompts, and PEFT's other types.

Their effect is not linear in their parameters, so that only the average of the parameters themselves has a meaning, among adapters
of one base, one configuration and one start. Weights are divided by their sum: equal adapters give themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ftcli.errors import Problem, RequestError
from ftcli.files import new_folder, sha256_of, write_json, write_text
from ftcli.merging.lora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from ftcli.merging.lora.write import TOKENIZER_FILES, write_tensors
from ftcli.merging.methods.registry import METHODS
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import ArrayInputs

# What may differ without a meaning for the parameters: where it came from, and how it was trained.
_FREE_KEYS = frozenset(
    ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping", "lora_dropout", "dropout", "task_type")
)
AVERAGED = ("ia3", "bottleneck", "prompt_tuning", "prefix_tuning", "p_tuning", "ln_tuning", "fourierft", "waveft", "c3a", "shira")
"""Types whose parameters may be averaged: they are vectors or whole functions, not factors of one another."""


@dataclass(frozen=True)
class AdapterAverage:
    """What is to be averaged."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    base: str | None = None
    scale: Literal["linear", "log"] = "linear"
    """`log` averages IA3's scales by their logarithms: halving and doubling cancel."""
    dtype: str = "float32"

    def check(self) -> None:
        """Refuse what has no average.

        Raises:
            RequestError: with every reason.
        """
        problems = list(self._problems())
        if problems:
            raise RequestError("the adapters cannot be averaged", problems)

    def _problems(self) -> Iterator[Problem]:
        first = self.adapters[0]
        for adapter in self.adapters:
            if adapter.kind == "lora":
                hint = "`merge_method: lora_concat` averages what they do"
                yield Problem(adapter.name, "is LoRA: an average of factors is no average of their products", hint)
            elif adapter.kind not in AVERAGED:
                hint = "fold each into its base (`ftcli merge --base BASE --adapter DIR -o OUT`) and merge the models"
                yield Problem(adapter.name, f"is `{adapter.kind}`: an average of its parameters is no average of what they do", hint)
            elif adapter.kind != first.kind:
                yield Problem(adapter.name, f"is `{adapter.kind}`, `{first.name}` is `{first.kind}`", "adapters of one kind")
            else:
                yield from self._differences(first, adapter)
        if abs(sum(self.weights)) < 1e-6 * max(1.0, sum(map(abs, self.weights))):
            yield Problem(
                "models", f"the weights {', '.join(map(str, self.weights))} sum to {sum(self.weights):g}: their mean is not finite"
            )
        bases = {adapter.base for adapter in self.adapters if adapter.base}
        if self.base is None and len(bases) > 1:
            what = f"the adapters name different bases: {', '.join(sorted(bases))}"
            yield Problem("base_model", what, "if they are the same model, name it: `base_model: ...`")
        if self.scale == "log" and first.kind != "ia3":
            yield Problem("parameters.scale", "`log` is for factors, those of IA3", "scale: linear")

    def _differences(self, first: Adapter, other: Adapter) -> Iterator[Problem]:
        for key in sorted((first.config.keys() | other.config.keys()) - _FREE_KEYS):
            found, expected = other.config.get(key), first.config.get(key)
            if _comparable(found) != _comparable(expected):
                what = f"has `{key}: {found}`, `{first.name}` has `{expected}`: their parameters mean different things"
                yield Problem(other.name, what, "adapters of one configuration")
        strangers = sorted(first.tensors.keys() ^ other.tensors.keys())
        both = sorted(first.tensors.keys() & other.tensors.keys())
        shapes = [name for name in both if first.tensors.shape(name) != other.tensors.shape(name)]
        if strangers or shapes:
            named = ", ".join([*strangers, *shapes][:3])
            yield Problem(other.name, f"does not have the same tensors as `{first.name}`: {named}", "adapters of one base")

    def averaged(self, name: str) -> Array:
        """One tensor's average."""
        arrays = [adapter.tensors[name] for adapter in self.adapters]
        if self.scale == "log" and name.endswith("ia3_l"):
            if any((array <= 0).any() for array in arrays):
                raise RequestError("a scale of 0 or below has no logarithm", [Problem(name, "is not positive everywhere", "scale: linear")])
            return np.exp(self._mean([np.log(array) for array in arrays]))
        return self._mean(arrays)

    def _mean(self, arrays: list[Array]) -> Array:
        function = METHODS["linear"].merge(ArrayInputs(arrays), {"weight": self.weights, "normalize": True})
        pieces = [function(piece) for piece in ArrayInputs(arrays).pieces()]
        return np.concatenate(pieces).reshape(arrays[0].shape)


def average_adapters(average: AdapterAverage, output: Path) -> dict[str, Any]:
    """Write the average at `output` in the adapters' own layout.

    Returns:
        The report: kind, tensors, output.

    Raises:
        RequestError: they have no average.
    """
    average.check()
    first = average.adapters[0]
    config = first.config | {"base_model_name_or_path": average.base or first.base, "inference_mode": True}
    tensors = {name: average.averaged(name) for name in first.tensors}
    report = {"output": str(output), "method": "adapter_average", "kind": first.kind, "tensors": len(tensors)}
    inputs = {f"{adapter.name}/{WEIGHTS_FILE}": adapter.folder / WEIGHTS_FILE for adapter in average.adapters}
    with new_folder(output) as partial:
        write_tensors(tensors, partial / WEIGHTS_FILE, average.dtype)
        write_text(partial / CONFIG_FILE, json.dumps(dict(sorted(config.items())), indent=2) + "\n")
        for name in TOKENIZER_FILES:
            if (first.folder / name).is_file():
                shutil.copyfile(first.folder / name, partial / name)
        hashes = {name: sha256_of(path) for name, path in inputs.items()}
        weights = list(average.weights)
        write_json(partial / "manifest.json", {"kind": "merge", "merge": "adapter_average", "weights": weights, "inputs": hashes})
        names = ", ".join(f"`{Path(adapter.name).name}`" for adapter in average.adapters)
        write_text(partial / "README.md", f"# {output.name}\n\nThe average of the {first.kind} adapters {names}, made by ftcli.\n")
    return report


def _comparable(value: Any) -> Any:
    """Lists stand for sets in these configurations; nothing is the same as empty."""
    if isinstance(value, list):
        return frozenset(map(str, value))
    return value or None
