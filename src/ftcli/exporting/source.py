"""Where the parts of a merge or an export come from: a run, a checkpoint, an adapter with its base, or a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError, UsageError
from ftcli.exporting.difference import probe_of
from ftcli.exporting.open_target import adapter_base

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from ftcli.models.quantisation import Quantization
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """Where the parts of a merge come from; every call of a loader gives a fresh object."""

    attached: Callable[[], nn.Module]
    """Base and adapter."""
    merge: Callable[[nn.Module], PreTrainedModel]
    original: Callable[[], PreTrainedModel]
    """The base before quantisation."""
    underlying: Callable[[], PreTrainedModel]
    """The base as it is under the adapter."""
    is_quantised: bool
    tokenizer: Tokenizer
    probe: list[list[int]]
    inputs: dict[str, Path]
    base: str | None
    dtype: str
    """Of the checkpoint the base was loaded from."""
    name: str
    device: str
    config: Callable[[], PretrainedConfig]
    """Of the base, without its weights."""
    adapter: Path | None = None
    """The folder of the adapter, in PEFT's layout; None where there is none."""
    holds_model: bool = False
    """A whole model was opened, and no adapter."""
    quantization: Quantization | None = None
    """How the base is stored under the adapter."""
    description: str = ""
    """What was opened, in a few words."""
    reference: str | None = None
    """What `open_source` opens again; None for a checkpoint or a base that was named beside its adapter."""
    recipe: Recipe | None = None
    """Of the run."""


def open_source(target: str, device: str = "auto") -> Source:
    """The parts of whatever a user points at: a run, a checkpoint of one, an adapter or a model folder, builtin:NAME, or a hub id.

    Raises:
        RequestError: there is nothing of the kind.
    """
    from ftcli.methods.adapter import CONFIG_FILE
    from ftcli.models.locate import model_folder
    from ftcli.reporting.found_run import ARTEFACTS, is_run

    where, path = chosen_device(device), Path(target).expanduser()
    if path.name in ARTEFACTS and is_run(path.parent):
        path = path.parent
    if is_run(path):
        return _whole_run(path, None, where)
    if path.parent.name == "checkpoints" and is_run(path.parent.parent):
        return _whole_run(path.parent.parent, path.name, where)
    if not path.exists() and is_run(Path("runs") / target):
        raise UsageError("there is no such model", [Problem("", f"`{target}` does not exist", f"did you mean `{Path('runs') / target}`?")])
    folder = model_folder(target)
    return adapter_source(folder, None, where) if (folder / CONFIG_FILE).is_file() else _model_source(target, folder, where)


def _whole_run(run_folder: Path, checkpoint: str | None, device: str) -> Source:
    from ftcli.recipe.load import load_recipe

    if not (run_folder / "recipe.resolved.yaml").is_file():
        raise RequestError("the run cannot be opened", [Problem(str(run_folder), "has no `recipe.resolved.yaml`")])
    recipe = load_recipe(run_folder / "recipe.resolved.yaml").recipe
    if checkpoint is None and not (run_folder / recipe.method.artefact).is_dir():
        problem = Problem(str(run_folder), f"is not finished: it has no {recipe.method.artefact}/", "name one of its checkpoints/")
        raise RequestError("the run cannot be opened", [problem])
    return run_source(recipe, run_folder, checkpoint, device)


def _model_source(target: str, folder: Path, device: str) -> Source:
    """A model without an adapter: its merge is itself."""
    from ftcli.models.load import as_pretrained, checkpoint_dtype, load_config, load_model
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(target)
    reference = str(folder.resolve()) if Path(target).expanduser().is_dir() else target

    def load() -> PreTrainedModel:
        return load_model(Model(base=reference), tokenizer, dtype="float32", device=device)

    return Source(
        attached=load,
        merge=as_pretrained,
        original=load,
        underlying=load,
        is_quantised=False,
        tokenizer=tokenizer,
        probe=probe_of(tokenizer, None),
        inputs=base_files(target, None),
        base=reference,
        dtype=checkpoint_dtype(folder) if (folder / "config.json").is_file() else "float32",
        config=lambda: load_config(Model(base=reference), tokenizer),
        name=target.removeprefix("builtin:").rpartition("/")[2] if reference == target else folder.resolve().name,
        device=device,
        holds_model=True,
        description=f"model {target}",
        reference=reference,
    )


def adapter_source(folder: Path, base: str | None, device: str, quantization: Quantization | None = None) -> Source:
    """An adapter in PEFT's layout.

    Args:
        base: what it goes on; None for the model that it names.

    Raises:
        RequestError: it names no base, or is of a kind ftcli cannot put on one.
    """
    from ftcli.methods.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter, merge_adapter
    from ftcli.models.added_rows import read_rows
    from ftcli.models.load import checkpoint_dtype, load_config, load_model
    from ftcli.models.locate import model_folder
    from ftcli.models.settings import Model, noted_rope_settings
    from ftcli.models.tokenizer import load_tokenizer

    reference = str(folder.resolve()) if base is None and quantization is None else None
    base = base or adapter_base(str(folder), folder)
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer.json").is_file() else base)
    model = Model(base=base, rope=noted_rope_settings(folder))

    def load(stored: Quantization | None) -> PreTrainedModel:
        found = load_model(model, None, quantization=stored, dtype="float32", device=device)
        read_rows(found, folder)
        return found

    return Source(
        attached=lambda: load_adapter(load(quantization), folder),
        merge=merge_adapter,
        original=lambda: load(None),
        underlying=lambda: load(quantization),
        is_quantised=quantization is not None,
        tokenizer=tokenizer,
        probe=probe_of(tokenizer, None),
        inputs={name: folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)} | base_files(base, None),
        base=base,
        dtype=checkpoint_dtype(model_folder(base)),
        name=folder.resolve().name,
        device=device,
        config=lambda: load_config(model, tokenizer),
        adapter=folder,
        quantization=quantization,
        description=f"adapter {folder} on {base}",
        reference=reference,
    )


def run_source(recipe: Recipe, run_folder: Path, checkpoint: str | None, device: str) -> Source:
    """The parts of a run's result, or of its checkpoint `best`, `last`, `120` or `step-000120`."""
    from ftcli.methods.adapter import CONFIG_FILE
    from ftcli.methods.context import AttachContext
    from ftcli.models.added_rows import fold_rows, read_rows
    from ftcli.models.load import load_config, load_model
    from ftcli.training.assemble import attached as method_attached
    from ftcli.training.seeds import derive_seed

    method, seed = recipe.method, recipe.train.seed
    tokenizer = recipe.model.load_tokenizer()

    def load(quantization: Quantization | None) -> PreTrainedModel:
        options: dict[str, Any] = {"dtype": "float32", "seed": derive_seed(seed, "model"), "head": recipe.objective.head}
        found = load_model(recipe.model, tokenizer, quantization=quantization, device=device, **options)
        if kept is None:
            read_rows(found, artefact)
        return found

    artefact = run_folder / method.artefact
    kept = None if checkpoint is None else _checkpoint_folder(run_folder, checkpoint)

    def attached() -> nn.Module:
        base = load(method.quantization())
        if kept is None:
            return method.load(base, artefact)
        module = method_attached(recipe, base, AttachContext(seed=derive_seed(seed, "method"), restoring=True))
        _restore(module, kept)
        fold_rows(module)
        return module.eval()

    trained = artefact if kept is None else kept
    return Source(
        attached=attached,
        merge=method.merge,
        original=lambda: load(None),
        underlying=lambda: load(method.quantization()),
        is_quantised=method.quantization() is not None,
        tokenizer=tokenizer,
        probe=probe_of(tokenizer, recipe),
        inputs={path.name: path for path in sorted(trained.iterdir()) if path.is_file()}
        | {"recipe.resolved.yaml": run_folder / "recipe.resolved.yaml"}
        | ({} if recipe.model.base is None else base_files(recipe.model.base, recipe.model.revision)),
        base=recipe.model.base,
        dtype=_trained_dtype(recipe),
        name=recipe.name,
        config=lambda: load_config(recipe.model, tokenizer),
        device=device,
        adapter=artefact if kept is None and (artefact / CONFIG_FILE).is_file() else None,
        holds_model=kept is None and method.artefact == "model",
        quantization=method.quantization(),
        description=f"run {run_folder}" if kept is None else f"checkpoint {kept.name} of run {run_folder}",
        reference=str((run_folder if kept is None else kept).resolve()),
        recipe=recipe,
    )


def _trained_dtype(recipe: Recipe) -> str:
    """The dtype that the recipe asks for, else of the run's own weights or of the base's checkpoint."""
    from ftcli.models.load import checkpoint_dtype
    from ftcli.models.locate import model_folder

    model = recipe.model
    if model.dtype != "auto":
        return model.dtype
    if recipe.method.artefact == "model" or model.base is None:
        return "float32"
    return checkpoint_dtype(model_folder(model.base, model.revision))


def _restore(module: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into `module`."""
    from ftcli.training.checkpoint import load_trainable, verified_state

    verified_state(checkpoint)
    load_trainable(module, checkpoint)


def _checkpoint_folder(run_folder: Path, checkpoint: str) -> Path:
    """The folder of checkpoint `best`, `last`, `120` or `step-000120`."""
    import json

    from ftcli.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(run_folder / "checkpoints", keep=1)
    steps = checkpoints.steps()
    step = None
    if checkpoint == "last" and steps:
        step = steps[-1]
    elif checkpoint == "best" and steps:
        state = json.loads((checkpoints.path(steps[-1]) / "progress.json").read_text(encoding="utf-8"))
        step = state["progress"].get("best_step")
    elif checkpoint.removeprefix("step-").isdecimal():
        step = int(checkpoint.removeprefix("step-"))
    if step not in steps or step is None:
        raise UsageError(f"no checkpoint `{checkpoint}` in {run_folder}", hint=f"checkpoints: {listed_steps(run_folder)}")
    return checkpoints.path(step)


def listed_steps(run_folder: Path) -> str:
    from ftcli.training.checkpoint import Checkpoints

    steps = Checkpoints(run_folder / "checkpoints", keep=1).steps()
    return ", ".join(map(str, steps)) or "none"


def base_files(base: str, revision: str | None) -> dict[str, Path]:
    from ftcli.models.locate import model_folder

    return {f"base/{path.name}": path for path in sorted(model_folder(base, revision).glob("*.safetensors"))}


def chosen_device(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
