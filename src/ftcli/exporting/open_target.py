"""From whatever a user points at to a model that can answer: a run, one of its checkpoints, a folder, an adapter, a name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ftcli.errors import Problem, RequestError, UsageError, did_you_mean
from ftcli.models.adapter_start import HINT, lost_start
from ftcli.reporting.found_run import ARTEFACTS, RESOLVED_RECIPE, has_artefact, is_run

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.models.adapters import Adapters
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.init_from import Origin

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model ready to generate."""

    model: nn.Module
    tokenizer: Tokenizer
    description: str
    """What was opened, in a few words."""


def open_target(target: str, *, device: str = "auto") -> Loaded:
    """The model a user names, in evaluation mode.

    Args:
        target: a run folder, a checkpoint or the artefact in one, a folder with a model or a PEFT adapter, builtin:NAME, or a hub id.
        device: `auto` takes an accelerator where there is one.

    Raises:
        RequestError: there is nothing of the kind, or it cannot be loaded.
    """
    from ftcli.models.quiet import quiet_libraries

    with quiet_libraries():
        return _open(target, _device(device))


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapters:
    """A base with adapters, one of which is in place at a time."""

    adapters: Adapters
    tokenizer: Tokenizer
    description: str
    """What was opened, in a few words."""


def open_adapters(target: str, folders: Mapping[str, str], *, device: str = "auto") -> LoadedAdapters:
    """A base model, loaded once, with adapters by name.

    Args:
        target: the base: a model folder, builtin:NAME, or a hub id; or a run that left a whole model.
        folders: for each name a run that left an adapter, or a folder with an adapter in PEFT's layout.

    Raises:
        RequestError: the base is no plain model, or an adapter belongs to another one, or does not fit.
    """
    from ftcli.models.adapters import Adapters
    from ftcli.models.fingerprint import base_fingerprint
    from ftcli.models.quiet import quiet_libraries

    with quiet_libraries():
        loaded = _open(target, _device(device))
        if hasattr(loaded.model, "peft_config"):
            problem = Problem(target, f"is no plain model: {loaded.description}", "name the base itself")
            raise RequestError("adapters go on a base model", [problem])
        base = cast("PreTrainedModel", loaded.model)
        fingerprint, adapters = base_fingerprint(base), Adapters(base)
        for name, folder in folders.items():
            adapters.add(name, _adapter_loader(name, folder, target, base, fingerprint))
    return LoadedAdapters(adapters, loaded.tokenizer, f"{loaded.description} with {', '.join(folders)}")


def _adapter_loader(name: str, folder: str, target: str, base: PreTrainedModel, fingerprint: str) -> Callable[[PreTrainedModel], nn.Module]:
    """What puts the adapter on the base it was trained on.

    Raises:
        RequestError: there is none, or it was trained on another base, or on this one in another form.
    """
    from ftcli.methods.adapter import load_adapter
    from ftcli.models.added_rows import needs_another_base
    from ftcli.models.fingerprint import is_other_base
    from ftcli.models.settings import noted_quantization

    where = f"--adapter {name}={folder}"
    origin = _origin(Path(folder).expanduser(), where)
    if origin.what != "adapter":
        problem = Problem(where, f"holds a {origin.what}, and no adapter that can be put on a base")
        raise RequestError("the adapter cannot be loaded", [problem])
    if (needed := needs_another_base(origin.folder)) is not None:
        problem = Problem(where, f"{needed}, and this base has none", f"`ftcli serve {folder}` and `ftcli generate {folder}` open it alone")
        raise RequestError("the adapter cannot share a base", [problem])
    is_other = is_other_base(fingerprint, origin.fingerprint) if origin.fingerprint else not _is_same_name(origin.base, target, base)
    if is_other:
        trained_on = f"`{origin.base}`" if origin.base else "a base made from random weights"
        problem = Problem(where, f"was trained on {trained_on}, and this base is `{target}`")
        raise RequestError("the adapter is of another base", [problem])
    method = None if origin.recipe is None else origin.recipe.method
    quantization = noted_quantization(origin.folder) if method is None else method.quantization()
    if quantization is not None:
        problem = Problem(
            where, f"was trained on `{origin.base}` quantised, and would compute something else here", f"ftcli generate {folder}"
        )
        raise RequestError("the adapter is of another base", [problem])
    if method is None:
        return lambda model: load_adapter(model, origin.folder, shares_base=True)
    return lambda model: method.load(model, origin.folder)


def _origin(path: Path, where: str) -> Origin:
    """The adapter that a command line names.

    Raises:
        RequestError: there is nothing of the kind; names the option, not the key of a recipe.
    """
    from ftcli.training.init_from import find_origin

    try:
        return find_origin(path)
    except RequestError as error:
        beside = sorted(item.name for item in path.parent.iterdir() if item.is_dir()) if path.parent.is_dir() else []
        near = None if path.exists() else did_you_mean(path.name, beside)
        what = "; ".join(problem.what for problem in error.problems) or str(error)
        hint = near or "a run that left an adapter, or a folder with `adapter_config.json`"
        raise RequestError("the adapter cannot be loaded", [Problem(where, what, hint)]) from error


def _is_same_name(noted: str | None, target: str, base: PreTrainedModel) -> bool:
    """Does an adapter that says nothing but a name mean this base?"""
    names = {target, str(base.config._name_or_path), str(Path(target).expanduser().resolve())}
    return noted is None or noted in names or str(Path(noted).expanduser().resolve()) in names


def _open(target: str, place: torch.device) -> Loaded:
    path = Path(target).expanduser()
    if is_run(path):
        return _open_run(path, place)
    if path.name in ARTEFACTS and is_run(path.parent):
        return _open_run(path.parent, place)
    if path.parent.name == CHECKPOINTS and is_run(path.parent.parent):
        return _open_checkpoint(path.parent.parent, path, place)
    if not path.exists() and is_run(Path("runs") / target):
        raise UsageError("there is no such model", [Problem("", f"`{target}` does not exist", f"did you mean `{Path('runs') / target}`?")])
    return _open_model(target, place)


def _open_run(run: Path, device: torch.device) -> Loaded:
    """What the run has left; its last checkpoint where it has not ended."""
    from ftcli.training.checkpoint import Checkpoints

    recipe = _recipe(run)
    kind = recipe.method.artefact
    if has_artefact(run, kind):
        return _open_artefact(run, recipe, device)
    checkpoints = Checkpoints(run / CHECKPOINTS, keep=1)
    steps = checkpoints.steps()
    if not steps:
        what = f"has neither `{kind}/` nor a checkpoint: nothing has been trained yet"
        raise RequestError("the run cannot be opened", [Problem(str(run), what, "train it, or go on with --resume")])
    return _open_checkpoint(run, checkpoints.path(steps[-1]), device)


def _open_artefact(run: Path, recipe: Recipe, device: torch.device) -> Loaded:
    from ftcli.models.added_rows import read_rows
    from ftcli.models.load import load_model
    from ftcli.models.settings import Model
    from ftcli.training.assemble import load_base, weights_dtype

    folder = run / recipe.method.artefact
    tokenizer = _tokenizer(recipe, folder)
    if recipe.method.artefact == "model":
        spec = Model(base=str(folder.resolve()), attention=recipe.model.attention, trust_remote_code=recipe.model.trust_remote_code)
        return Loaded(
            load_model(spec, tokenizer, dtype=weights_dtype(recipe), device=device, head=None if recipe.objective.head is None else "own"),
            tokenizer,
            f"model of run {run}",
        )
    base = load_base(recipe, tokenizer, device)
    read_rows(base, folder)
    module = recipe.method.load(base, folder)
    return Loaded(module.eval(), tokenizer, f"adapter of run {run} on {recipe.model.base}")


def _open_checkpoint(run: Path, folder: Path, device: torch.device) -> Loaded:
    from ftcli.methods.context import AttachContext
    from ftcli.models.added_rows import fold_rows
    from ftcli.training.assemble import attached, load_base
    from ftcli.training.checkpoint import load_trainable, verified_state
    from ftcli.training.seeds import derive_seed, seed_torch

    recipe = _recipe(run)
    verified_state(folder)
    tokenizer = _tokenizer(recipe, folder)
    base = load_base(recipe, tokenizer, device)
    seed_torch(recipe.train.seed, "attach")
    module = attached(recipe, base, AttachContext(seed=derive_seed(recipe.train.seed, "method"), restoring=True))
    load_trainable(module, folder)
    fold_rows(module)
    return Loaded(module.eval(), tokenizer, f"checkpoint {folder.name} of run {run}")


def _open_model(target: str, device: torch.device) -> Loaded:
    """A model by its folder or name, or a PEFT adapter with the base that it names."""
    from ftcli.models.classifier import folder_head
    from ftcli.models.load import load_model
    from ftcli.models.locate import model_folder
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import load_tokenizer

    folder = model_folder(target)
    if (folder / ADAPTER_CONFIG).is_file():
        return _open_adapter(target, folder, device)
    tokenizer = load_tokenizer(target)
    reference = str(folder.resolve()) if Path(target).expanduser().is_dir() else target
    return Loaded(load_model(Model(base=reference), tokenizer, device=device, head=folder_head(folder)), tokenizer, target)


def _open_adapter(target: str, folder: Path, device: torch.device) -> Loaded:
    from ftcli.models.added_rows import read_rows
    from ftcli.models.load import load_model
    from ftcli.models.settings import Model, noted_quantization, noted_rope_settings
    from ftcli.models.tokenizer import load_tokenizer

    base = adapter_base(target, folder)
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer.json").is_file() else base)
    model = load_model(Model(base=base, rope=noted_rope_settings(folder)), None, quantization=noted_quantization(folder), device=device)
    read_rows(model, folder)
    from peft import PeftModel

    import ftcli.methods.bottleneck.tuner  # noqa: F401  # makes PEFT know bottleneck adapters

    try:
        module = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise RequestError("the adapter cannot be loaded", [Problem(target, first_line)]) from error
    return Loaded(module.eval(), tokenizer, f"adapter {target} on {base}")


def adapter_base(target: str, folder: Path) -> str:
    """The base that an adapter names.

    Raises:
        RequestError: it names none, or its weights are not in safetensors (PEFT would open a pickle file instead), or what it adds to
            that base is not known.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise RequestError("the adapter cannot be loaded", [Problem(target, f"`{ADAPTER_CONFIG}` is no JSON object")]) from error
    if not isinstance(base, str) or not base:
        raise RequestError("the adapter cannot be loaded", [Problem(target, f"`{ADAPTER_CONFIG}` names no base model")])
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise RequestError("the adapter cannot be loaded", [Problem(target, f"has no `{ADAPTER_WEIGHTS}`")])
    if (lost := lost_start(config)) is not None:
        raise RequestError("the adapter cannot be loaded", [Problem(target, lost, HINT)])
    beside = folder / base
    return str(beside.resolve()) if base.startswith(".") and beside.is_dir() else base


def _recipe(run: Path) -> Recipe:
    from ftcli.recipe.load import load_recipe

    if not (run / RESOLVED_RECIPE).is_file():
        raise RequestError("the run cannot be opened", [Problem(str(run), f"has no `{RESOLVED_RECIPE}`")])
    return load_recipe(run / RESOLVED_RECIPE).recipe


def _tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """The tokenizer that was saved with the weights, or the recipe's."""
    from ftcli.models.tokenizer import load_tokenizer

    return load_tokenizer(str(folder.resolve())) if (folder / "tokenizer.json").is_file() else recipe.model.load_tokenizer()


def _device(name: str) -> torch.device:
    """The torch device of that name, or for `auto` the best there is.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cuda", *(f"cuda:{index}" for index in range(num_cuda))] if num_cuda else []
    here += ["mps"] if torch.backends.mps.is_available() else []
    here.append("cpu")
    if name != "auto" and name not in here:
        raise UsageError(f"--device {name}: there is no such device here", hint=f"auto, {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)
