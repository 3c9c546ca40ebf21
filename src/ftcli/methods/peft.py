"""Any of PEFT's ways to adapt linear layers, by PEFT's own names. Source: https://github.com/huggingface/peft, version 0.21."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ftcli.errors import Problem, RequestError
from ftcli.methods.method import MethodSettings
from ftcli.methods.peft_types import LEFT_OUT, TYPES, faults

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext

TypeName = Literal[
    "beft",
    "boft",
    "c3a",
    "deft",
    "delora",
    "fourierft",
    "frod",
    "glora",
    "gralora",
    "hira",
    "hra",
    "lily",
    "loha",
    "lokr",
    "miss",
    "oft",
    "osf",
    "peanut",
    "psoft",
    "pvera",
    "randlora",
    "road",
    "shira",
    "supertuning",
    "tinylora",
    "unilora",
    "vblora",
    "vera",
    "waveft",
]


class Peft(MethodSettings):
    """One of PEFT's ways to adapt linear layers.

    The base stays frozen, and what is saved is what PEFT reads. `type` is its name in PEFT, `config` the fields of its configuration
    by PEFT's own names. Which to take: `miss` and `oft` learn about as well as LoRA at its cost; `hira` and `randlora` change the
    weights at full rank; `shira` leaves 98 % of the weights as they are; `hra`, `boft`, `oft` and `psoft` only rotate; `vera`,
    `fourierft`, `waveft`, `c3a` and `road` are for adapters of kilobytes, at some loss of quality; `osf` is full fine-tuning that
    keeps out of the directions the base uses most.

    At the start the model computes what the base does, but for `vblora` and `unilora`, whose random vectors are all there is to
    begin with. All types merge into plain weights but `lily`, which routes, and `beft`, which adds biases.
    Default learning rates: `ftcli.methods.peft_types` says how each was found (`scripts/bench/peft_lr.py`). PEFT's own comparison
    on GSM8K: hira .51, shira .51, miss .49 to .50, oft .49, c3a .49, lokr .47, vera .35, fourierft .10 (of LoRA .47
    to .51).
    """

    kind: Literal["peft"] = "peft"
    type: TypeName = "miss"
    """PEFT's name of the adapter: `loha`, `oft`, `vera`, ..."""
    config: dict[str, Any] = {}
    """Fields of PEFT's configuration of that type, by their own names; what is not given has PEFT's default, fitted to the layers."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get an adapter: ends of module names (`q_proj`, `mlp.*`, `layers.[01].*`), or all but the output head."""
    extra_trained_modules: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter: `embed_tokens`, `lm_head`, norms."""

    artefact: ClassVar[Literal["model", "adapter"]] = "adapter"

    @property
    def default_lr(self) -> float:  # type: ignore[override]  # a constant of the type, not of the kind
        """Peak learning rate of the type for a model of width 4096, where the recipe gives none."""
        return TYPES[self.type].lr

    @field_validator("type", mode="before")
    @classmethod
    def _give_the_reason(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower() in LEFT_OUT:
            raise ValueError(f"`{value}` is not among the types: {LEFT_OUT[value.lower()]}")
        return value

    @model_validator(mode="after")
    def _check_config(self) -> Self:
        found = faults(self.type, self.config)
        if found:
            details = [
                InitErrorDetails(
                    type=PydanticCustomError("value_error", "{error}", {"error": fault.what, "hint": fault.hint}),
                    loc=("config", fault.name),
                    input=self.config[fault.name],
                )
                for fault in found
            ]
            raise ValidationError.from_exception_data("Peft", details)
        return self

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """`model` with PEFT's layers around its frozen linear layers.

        Raises:
            RequestError: a pattern matches nothing, or PEFT cannot adapt these layers with these settings.
        """
        import torch

        from ftcli.methods.targets import extra_names, target_names
        from ftcli.models.classifier import head_names
        from ftcli.models.quiet import quiet_libraries

        with quiet_libraries():
            from peft import get_peft_model

            from ftcli.methods.adapter import settle_trained_copies

            extra = [*extra_names(model, self.extra_trained_modules), *head_names(model)]
            targets = target_names(model, self.target_modules, extra)
            self._require_layers(model, targets)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.seed)
                try:
                    module = get_peft_model(model, self._peft_config(model, targets, extra, context.seed))
                except (ValueError, TypeError, NotImplementedError, KeyError) as error:
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    raise RequestError(f"PEFT's `{self.type}` does not fit the model", [Problem("method.config", reason)]) from error
            settle_trained_copies(module)
            _require_targets(module, targets, self.type)
        return cast("nn.Module", module)

    def parameter_groups(self, module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for a torch optimizer; no weight decay where zero would be no step back towards the base."""
        return super().parameter_groups(module, lr, weight_decay if TYPES[self.type].decays else 0.0)

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the adapter as PEFT reads it."""
        from ftcli.methods.adapter import save_adapter

        save_adapter(module, folder)

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """The saved adapter on a fresh `base`."""
        from ftcli.methods.adapter import load_adapter

        return load_adapter(base, folder, self.type.upper())

    @property
    def merges(self) -> bool:
        """As the type says."""
        return TYPES[self.type].merges is None

    def merge(self, module: nn.Module) -> PreTrainedModel:
        """The base with the adapter folded into plain weights, every layer compared; refused where the type has none."""
        from ftcli.methods.adapter import merge_adapter

        if reason := TYPES[self.type].merges:
            raise RequestError(f"PEFT's `{self.type}` cannot be merged", [Problem("method.type", reason)])
        return merge_adapter(module)

    def _require_layers(self, model: PreTrainedModel, targets: Sequence[str]) -> None:
        from transformers.pytorch_utils import Conv1D

        conv = next((name for name in targets if isinstance(model.get_submodule(name), Conv1D)), None)
        if conv is not None and not TYPES[self.type].conv1d:
            others = ", ".join(name for name, known in TYPES.items() if known.conv1d)
            what = f"`{self.type}` cannot adapt `{conv}`, a Conv1D of GPT-2's kind"
            raise RequestError("the method does not fit the model", [Problem("method.type", what, f"kind `lora`, or types {others}")])

    def _require_divisors(self, model: PreTrainedModel, targets: Sequence[str]) -> None:
        """OFT's block size has to divide the layers' inputs; PEFT would take another one, with a warning."""
        size = self.config.get("oft_block_size") if self.type == "oft" else None
        sides = sorted({_num_inputs(model.get_submodule(name)) for name in targets})
        if size and any(side % size for side in sides):
            what = f"found {size}, allowed: a divisor of the layers' inputs, {', '.join(map(str, sides))}"
            hint = f"such as {_divisor(sides, size)}"
            raise RequestError("the method does not fit the model", [Problem("method.config.oft_block_size", what, hint)])

    def _peft_config(self, model: PreTrainedModel, targets: Sequence[str], extra: Sequence[str], seed: int) -> Any:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType
        from transformers.pytorch_utils import Conv1D

        from ftcli.methods.peft_fields import FIELDS
        from ftcli.methods.targets import shortest_suffixes
        from ftcli.models.classifier import task_type

        self._require_divisors(model, targets)
        values: dict[str, Any] = {**_fitted(self.type, model, targets), **TYPES[self.type].start, **self.config}
        if "random_seed" in FIELDS[self.type] and values.get("random_seed") is None:
            values["random_seed"] = seed % 2**31  # without one, shira's mask is the same whatever the run's seed
        for name, value in self.config.items():
            if name.endswith("_pattern") and value:
                values[name] = _by_target(name, value, targets)
        if "fan_in_fan_out" in FIELDS[self.type]:
            values["fan_in_fan_out"] = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
        if extra:
            values["modules_to_save"] = list(extra)
        config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[self.type.upper()]]
        return config_class(task_type=task_type(model), target_modules=shortest_suffixes(targets, model), **values)


def _by_target(field: str, pattern: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """The value of every target that a pattern matches, by its full name: PEFT would take the keys for regular expressions."""
    from ftcli.methods.targets import matches

    unmatched = [key for key in pattern if not any(matches(name, key) for name in targets)]
    if unmatched:
        problems = [Problem(f"method.config.{field}", f"`{key}` matches no target") for key in unmatched]
        raise RequestError("the method does not fit the model", problems)
    chosen = {name: next((value for key, value in pattern.items() if matches(name, key)), None) for name in targets}
    return {name: value for name, value in chosen.items() if value is not None}


def _fitted(kind: str, model: PreTrainedModel, targets: Sequence[str]) -> dict[str, Any]:
    """PEFT's defaults where its own would not fit the layers: block sizes that divide them, no more numbers than they have."""
    weights: list[Any] = [model.get_submodule(name).weight for name in targets]
    shapes = [tuple(weight.shape) for weight in weights]
    if not shapes or any(len(shape) != 2 for shape in shapes):
        return {}
    sides = [side for shape in shapes for side in shape]
    smallest, fewest = min(sides), min(first * second for first, second in shapes)
    # shira trains r * (in + out) numbers of a matrix: at most half of them
    most_rows = min(first * second // (2 * (first + second)) for first, second in shapes)
    choices = {
        "c3a": {"block_size": _divisor(sides, 256)},
        "road": {"group_size": _divisor(sides, 64)},
        "vblora": {"vector_length": _divisor(sides, 256)},
        "oft": {"oft_block_size": _divisor(sides, 32)},
        "boft": {"boft_block_size": _divisor(sides, 4)},
        "miss": {"r": _divisor(sides, min(64, smallest))},
        "psoft": {"r": min(32, smallest)},
        "shira": {"r": max(1, min(32, most_rows))},
        "fourierft": {"n_frequency": min(1000, fewest)},
        "waveft": {"n_frequency": min(2592, fewest)},
    }
    return choices.get(kind, {})


def _num_inputs(layer: Any) -> int:
    return int(layer.in_features) if hasattr(layer, "in_features") else int(layer.weight.shape[0])  # Conv1D stores (in, out)


def _divisor(sides: Sequence[int], limit: int) -> int:
    """The largest number up to `limit` that divides every one of `sides`.

    Example:
        >>> _divisor([192, 512, 96], 64)
        32
    """
    common = gcd(*sides)
    return max(number for number in range(1, limit + 1) if common % number == 0)


def _require_targets(module: Any, targets: Sequence[str], kind: str) -> None:
    """PEFT leaves out what it cannot adapt, for some types without a word."""
    from ftcli.methods.peft_merge import tuner_layers

    missing = sorted(set(targets) - {name for name, _ in tuner_layers(module.get_base_model())})
    if missing:
        what = f"`{kind}` leaves out {len(missing)} of {len(targets)} layers, `{missing[0]}` among them"
        raise RequestError("the method does not fit the model", [Problem("method.type", what, "name others by method.target_modules")])
