"""The beginning of a run from another run's result: its adapter goes on or is built upon, its model goes on.

This is not resuming. Optimizer, data, order and number of steps are the new recipe's; only weights are taken. `stack` keeps the
earlier LoRA factors frozen beside the new ones, A = [new; old] and B = [new, old], so that what is saved is one adapter on the
original base, which any tool loads; merging the earlier adapter into the base would leave an adapter that fits no model on disk.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftcli.errors import FtcliError, Problem, RequestError, did_you_mean
from ftcli.files import sha256_of
from ftcli.models.adapter_start import start_of
from ftcli.models.added_rows import read_rows
from ftcli.models.fingerprint import base_fingerprint, is_other_base, noted_base
from ftcli.training.same_reading import require_same_reading

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext
    from ftcli.recipe.recipe import Recipe

CHECKPOINTS, RESOLVED_RECIPE = "checkpoints", "recipe.resolved.yaml"
ARTEFACTS = {"adapter": "adapter_config.json", "model": "config.json"}
# What may differ between two recipes that train the same adapter: none of it is in what the adapter computes.
_FREE_SETTINGS = {"dropout", "lora_plus_ratio", "quantize", "target_modules", "rank_pattern"}
_RUN_SETTINGS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
_SHAPE_SETTINGS = {"target_modules", "rank_pattern", "modules_to_save", "feedforward_modules", "total_step", "tinit", "tfinal"}


@dataclass(frozen=True)
class Origin:
    """What is begun from."""

    path: Path
    """As the recipe has it."""
    folder: Path
    """Where the weights are."""
    what: Literal["adapter", "model", "checkpoint"]
    recipe: Recipe | None
    """The earlier run's; None for an adapter without a run."""
    base: str | None
    fingerprint: str | None
    """Of its base; None where it was not recorded."""

    @property
    def artefact(self) -> str:
        """What the earlier run trained: an adapter, or a model."""
        return "adapter" if self.recipe is None else self.recipe.method.artefact

    def note(self, how: str) -> dict[str, Any]:
        """For the manifest: where the weights are from, and their hash."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            digest.update(f"{path.name} {sha256_of(path)} ".encode())
        return {"path": str(self.path), "what": self.what, "adapter": how, "sha256": digest.hexdigest()}


def begin(recipe: Recipe, base: PreTrainedModel, context: AttachContext) -> nn.Module:
    """The method on `base`, as it stands at the end of what `init_from` names.

    Raises:
        RequestError: there is no such thing, it belongs to another base, or cannot be continued by this method, and why.
    """
    assert recipe.init_from is not None
    how = recipe.init_from.adapter
    if context.restoring and recipe.method.artefact == "adapter" and how == "keep":
        return recipe.method.attach(base, context)  # the weights of a checkpoint come next
    origin = find_origin(Path(recipe.init_from.path))
    require_same_reading(recipe, origin)  # new tokens are in the base's fingerprint, which would only say that it is another
    _require_same_base(recipe, base, origin)
    read_rows(base, origin.folder)
    if origin.artefact != recipe.method.artefact:
        raise _refused(origin, f"holds {_a(origin.artefact)}, and kind `{recipe.method.kind}` trains {_a(recipe.method.artefact)}", origin)
    if how == "stack":
        return _stacked(recipe, base, context, origin)
    if origin.artefact == "model":
        _take_model(base, origin)
        return recipe.method.attach(base, context)
    _require_same_method(recipe, origin)
    module = recipe.method.attach(base, context)
    _take_checkpoint(module, origin) if origin.what == "checkpoint" else _take_adapter(module, origin)
    return module


def find_origin(path: Path) -> Origin:
    """What stands at `path`.

    Raises:
        RequestError: nothing that can be begun from.
    """
    if _is_run(path):
        artefact: str = _recipe(path).method.artefact
        if not (path / artefact / ARTEFACTS[artefact]).is_file():
            checkpoint = path / CHECKPOINTS / "step-..."
            raise _unfit(path, f"is a run that is not finished: it has no {artefact}/", f"name one of its checkpoints: {checkpoint}")
        return _of_run(path, path, path / artefact, artefact)
    if path.name in ARTEFACTS and _is_run(path.parent) and (path / ARTEFACTS[path.name]).is_file():
        return _of_run(path, path.parent, path, path.name)
    if path.parent.name == CHECKPOINTS and _is_run(path.parent.parent) and (path / "trainable.safetensors").is_file():
        return _of_run(path, path.parent.parent, path, "checkpoint")
    if (path / ARTEFACTS["adapter"]).is_file():
        return Origin(path, path, "adapter", None, *noted_base(path))
    what = "is no run, adapter or checkpoint" if path.exists() else "does not exist"
    hint = "a model folder goes under `model.base`" if (path / "config.json").is_file() else None
    if not path.exists() and path.parent.is_dir():
        hint = did_you_mean(path.name, [other.name for other in path.parent.iterdir() if other.is_dir()])
    raise _unfit(path, what, hint)


def _is_run(path: Path) -> bool:
    return (path / RESOLVED_RECIPE).is_file()


def _of_run(path: Path, run: Path, folder: Path, what: Any) -> Origin:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return Origin(path, folder, what, _recipe(run), manifest.get("base"), manifest.get("base_fingerprint"))


def _recipe(run: Path) -> Recipe:
    from ftcli.recipe.load import load_recipe

    return load_recipe(run / RESOLVED_RECIPE).recipe


def require_same_origin(recipe: Recipe, manifest: dict[str, Any]) -> None:
    """Refuse to resume where the frozen part of the run is not what it began with.

    Raises:
        RequestError: what `init_from` names has changed since.
    """
    if recipe.init_from is None or (recipe.method.artefact == "adapter" and recipe.init_from.adapter == "keep"):
        return
    kept, found = manifest.get("init_from", {}), find_origin(Path(recipe.init_from.path)).note(recipe.init_from.adapter)
    if kept.get("sha256") != found["sha256"]:
        raise RequestError(
            "cannot resume: `init_from` has changed", [Problem("init_from.path", f"`{recipe.init_from.path}` is another now")]
        )


def origin_note(recipe: Recipe) -> dict[str, Any] | None:
    """What the manifest says about the beginning."""
    if recipe.init_from is None:
        return None
    return find_origin(Path(recipe.init_from.path)).note(recipe.init_from.adapter)


def _require_same_base(recipe: Recipe, base: PreTrainedModel, origin: Origin) -> None:
    found = base_fingerprint(base)
    here = recipe.model.base or "random weights"
    is_other = is_other_base(found, origin.fingerprint) if origin.fingerprint else origin.base not in (None, recipe.model.base, _name(base))
    if is_other:
        what = f"was trained on `{origin.base or 'random weights'}`, and the recipe's base is `{here}`"
        if origin.base == recipe.model.base:
            what += ", whose weights are others now"
        raise _refused(origin, what, None)


def _name(base: PreTrainedModel) -> str:
    return str(base.config._name_or_path)


def _a(artefact: str) -> str:
    return "an adapter" if artefact == "adapter" else "a whole model"


def _refused(origin: Origin, what: str, to_hint: Origin | None) -> RequestError:
    hint = None
    if to_hint is not None and to_hint.artefact == "model":
        hint = f"`model: {{base: {to_hint.folder}}}` puts an adapter on it" if to_hint.what == "model" else None
    elif to_hint is not None:
        hint = "`ftcli merge` makes a model of it, which goes under `model.base`"
    return RequestError("the run cannot begin from this", [Problem("init_from.path", f"`{origin.path}` {what}", hint)])


def _unfit(path: Path, what: str, hint: str | None = None) -> RequestError:
    return RequestError("the run cannot begin from this", [Problem("init_from.path", f"`{path}` {what}", hint)])


def _require_same_method(recipe: Recipe, origin: Origin) -> None:
    """The adapter must mean the same in both recipes: the same kind and settings, but for what is used in training only."""
    method = recipe.method
    if getattr(method, "init", "default") != "default" and hasattr(method, "lora_plus_ratio"):
        hint = "init: default; the start is the earlier adapter's"
        problem = Problem("method.init", f"`{method.init}` would not be used: `init_from` keeps the earlier adapter", hint)  # type: ignore[union-attr]
        raise RequestError("the run cannot begin from this", [problem])
    if origin.recipe is None or origin.what != "checkpoint":
        return
    mine, theirs = method.model_dump(), origin.recipe.method.model_dump()
    kinds = {mine["kind"], theirs["kind"]}
    different = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key) and key not in _FREE_SETTINGS]
    if kinds == {"lora", "qlora"}:
        different = [key for key in different if key != "kind"]
    problems = [Problem(f"method.{key}", f"`{mine.get(key)}` here, `{theirs.get(key)}` in `{origin.path}`") for key in different]
    if problems:
        raise RequestError("the earlier adapter cannot be kept", problems, None)


def _take_model(base: PreTrainedModel, origin: Origin) -> None:
    """The earlier model's weights, into `base`."""
    from safetensors.torch import load_file

    from ftcli.models.load import load_weights
    from ftcli.training.checkpoint import verified_state

    if origin.what == "checkpoint":
        verified_state(origin.folder)
        found = load_file(origin.folder / "trainable.safetensors")
    else:
        found = load_weights(origin.folder, like=base).state_dict()
    own = base.state_dict()
    different = [name for name, tensor in found.items() if name not in own or own[name].shape != tensor.shape]
    if different:
        raise _refused(
            origin, f"has {len(different)} weights that the base has not, or not of this shape: {', '.join(different[:5])}", None
        )
    base.load_state_dict(found, strict=False)


def _take_checkpoint(module: nn.Module, origin: Origin) -> None:
    from ftcli.training.checkpoint import load_trainable, verified_state

    try:
        verified_state(origin.folder)
        load_trainable(module, origin.folder)
    except FtcliError as error:
        raise _refused(origin, error.summary, None) from error


def _take_adapter(module: Any, origin: Origin) -> None:
    """The earlier adapter's tensors, each into its place."""
    from peft import PeftModel, set_peft_model_state_dict

    from ftcli.methods.adapter import ADAPTER, check_tensors, read_config, read_tensors
    from ftcli.models.quiet import quiet_libraries

    if not isinstance(module, PeftModel):
        raise _refused(origin, "is an adapter that PEFT does not hold: only its checkpoints can be continued", None)
    mine, theirs = module.peft_config[ADAPTER].to_dict(), read_config(origin.folder).to_dict()
    own_type, their_type = (_plain(config["peft_type"]).lower() for config in (mine, theirs))
    _require_plain_start(origin, theirs)
    if own_type != their_type:
        raise _refused(origin, f"is an adapter of type `{their_type}`, and the method trains one of type `{own_type}`", None)
    problems = [
        Problem(f"method ({key})", f"`{_plain(mine.get(key))}` here, `{_plain(theirs.get(key))}` in `{origin.path}`")
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
        and key not in _RUN_SETTINGS | _SHAPE_SETTINGS
        and not key.endswith("dropout")
        and not key.startswith("init_")
    ]
    if problems:
        raise RequestError("the earlier adapter cannot be kept", problems)
    tensors = read_tensors(origin.folder)
    check_tensors(origin.folder, module, tensors)
    with quiet_libraries():
        set_peft_model_state_dict(module, tensors)


def _require_plain_start(origin: Origin, config: dict[str, Any]) -> None:
    """
    Raises:
        RequestError: PEFT takes the adapter's start off the base, which here stays as it is.
    """
    if (start := start_of(config)) is not None:
        raise _refused(origin, f"has a start that is taken off the base (`init_lora_weights: {start}`)", origin)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _stacked(recipe: Recipe, base: PreTrainedModel, context: AttachContext, origin: Origin) -> nn.Module:
    """New LoRA factors with the earlier ones frozen beside them."""
    from ftcli.methods.adapter import freeze_beside, lora_layers, read_config, read_tensors
    from ftcli.methods.low_rank import LowRank

    method = recipe.method
    if origin.what == "checkpoint" or not isinstance(method, LowRank) or method.variant == "dora" or method.init not in ("default", "eva"):
        what = "`stack` is for the adapter of a finished run, and kinds `lora` and `qlora` without dora, pissa, olora and loftq"
        hint = "for others: `ftcli merge`, and the merged model under `model.base`"
        raise RequestError("the run cannot begin from this", [Problem("init_from.adapter", what, hint)])
    config: Any = read_config(origin.folder, "LORA")
    _require_plain_start(origin, config.to_dict())
    if config.use_dora or config.modules_to_save or config.lora_bias or config.bias != "none":
        raise _refused(origin, "is more than a product of two matrices (dora, biases or whole modules): `stack` cannot hold it", origin)
    module = method.attach(base, context)
    factors = _factors(read_tensors(origin.folder))
    layers = {name.removeprefix("base_model.model."): layer for name, layer in lora_layers(module)}
    missing = sorted(factors.keys() - layers.keys())
    if missing:
        raise _refused(origin, f"has an adapter on {len(missing)} layers that get none here, `{missing[0]}` among them", None)
    for name, (factor_a, factor_b) in factors.items():
        freeze_beside(layers[name], factor_a, factor_b, _scaling(config, name, len(factor_a)))
    return module


def _factors(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer, by the layer's name in the base."""
    names = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    key = "base_model.model.{}.lora_{}.weight"
    return {name: (tensors[key.format(name, "A")], tensors[key.format(name, "B")]) for name in names}


def _scaling(config: Any, name: str, rank: int) -> float:
    """What PEFT multiplies the product with."""
    from peft.utils.other import get_pattern_key

    pattern = dict(config.alpha_pattern or {})
    alpha = float(pattern.get(get_pattern_key(list(pattern), name), config.lora_alpha))
    return alpha / rank**0.5 if config.use_rslora else alpha / rank
