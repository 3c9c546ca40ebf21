"""Where the parts of a merge or an export come from: a run, a checkpoint, an adapter with its base, or a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError, UsageError
from ftcli.exporting.difference import probe_of
from ftcli.exporting.open_target import adapter_base
from ftcli.exporting.same_base import require_same_base

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
    """A model without an adapter: its merge is itself, with plain weights."""
    from ftcli.methods.adapter import dequantised
    from ftcli.models.load import as_pretrained, checkpoint_dtype, load_config, load_model
    from ftcli.models.settings import Model
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(target)
    reference = str(folder.resolve()) if Path(target).expanduser().is_dir() else target

    def load() -> PreTrainedModel:
        found = load_model(Model(base=reference), tokenizer, dtype="float32", device=device)
        settle_stored(found, device)
        return found

    return Source(
        attached=load,
        merge=lambda module: dequantised(as_pretrained(module)),
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
    from ftcli.methods.adapter import load_adapter, merge_adapter
    from ftcli.models.added_rows import read_rows
    from ftcli.models.fingerprint import noted_base
    from ftcli.models.load import checkpoint_dtype, load_config, load_model
    from ftcli.models.locate import model_folder
    from ftcli.models.settings import Model, noted_quantization, noted_rope_settings
    from ftcli.models.tokenizer import load_tokenizer

    reference = str(folder.resolve()) if base is None and quantization is None else None
    quantization = noted_quantization(folder) if reference is not None else quantization
    base = base or adapter_base(str(folder), folder)
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer.json").is_file() else base)
    model = Model(base=base, rope=noted_rope_settings(folder))

    # who names the base wants the adapter on that one
    recorded = noted_base(folder)[1] if reference is not None else None

    def load(stored: Quantization | None, dtype: str = "float32") -> PreTrainedModel:
        found = load_model(model, None, quantization=stored, dtype=dtype, device=device)
        if stored is None:
            settle_stored(found, device)
        read_rows(found, folder)
        if dtype == "float32":
            require_same_base(found, recorded, folder, base, (load(stored, rounded) for rounded in ("bfloat16", "float16")))
        return found

    return Source(
        attached=lambda: load_adapter(load(quantization), folder),
        merge=merge_adapter,
        original=lambda: load(None),
        underlying=lambda: load(quantization),
        is_quantised=quantization is not None,
        tokenizer=tokenizer,
        probe=probe_of(tokenizer, None),
        inputs=read_files(folder) | base_files(base, None),
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
    import torch

    from ftcli.methods.adapter import CONFIG_FILE
    from ftcli.methods.context import AttachContext
    from ftcli.models.added_rows import fold_rows, read_rows
    from ftcli.models.load import load_config, load_model
    from ftcli.training.assemble import attached as method_attached
    from ftcli.training.assemble import load_base
    from ftcli.training.seeds import derive_seed

    method, seed = recipe.method, recipe.train.seed
    tokenizer = recipe.model.load_tokenizer()

    def load(quantization: Quantization | None) -> PreTrainedModel:
        options: dict[str, Any] = {"dtype": "float32", "seed": derive_seed(seed, "model"), "head": recipe.objective.head}
        found = load_model(recipe.model, tokenizer, quantization=quantization, device=device, **options)
        if quantization is None:
            settle_stored(found, device)
        if method.artefact == "adapter" or kept is not None:
            as_trained = (load_base(recipe, tokenizer, place) for place in (torch.device(device),))
            require_same_base(found, recorded, run_folder, recipe.model.base, as_trained)
        if kept is None:
            read_rows(found, artefact)
        return found

    artefact = run_folder / method.artefact
    kept = None if checkpoint is None else _checkpoint_folder(run_folder, checkpoint)
    recorded = _base_of(run_folder)

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


def settle_stored(model: PreTrainedModel, device: str) -> None:
    """Where a model's own folder has it in 8 or 4 bits, let products be exactly those of the weights that these stand for."""
    from torch import nn as layers

    from ftcli.models.quantisation import Quantization, is_quantised, settle

    if any(map(is_quantised, model.modules())):
        layers.Module.float(model)  # of such a folder not every weight is read in the dtype asked for
        settle(model, Quantization(), device)


def _base_of(run_folder: Path) -> str | None:
    """The fingerprint of the base that the run began with; None where it left none."""
    import json

    path = run_folder / "manifest.json"
    try:
        found: str | None = json.loads(path.read_text(encoding="utf-8")).get("base_fingerprint")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise RequestError("the run cannot be opened", [Problem(str(path), "is no JSON object")]) from error
    return found


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
    """What of a model is read: weights, configurations, tokenizer, template."""
    from ftcli.models.locate import model_folder

    return {f"base/{name}": path for name, path in read_files(model_folder(base, revision)).items()}


def read_files(folder: Path) -> dict[str, Path]:
    """The files of a model or an adapter that a loader reads, by name; not what ftcli says about them."""
    from ftcli.models.locate import SMALL_FILES, WEIGHT_FILES
    from ftcli.reporting.found_run import MANIFEST

    found = {path.name: path for pattern in (*SMALL_FILES, *WEIGHT_FILES) for path in sorted(folder.glob(pattern)) if path.is_file()}
    return {name: path for name, path in found.items() if name != MANIFEST}


def require_plain(source: Source) -> None:
    """Refuse a source that cannot become a language model with plain weights, from its configuration alone.

    Raises:
        RequestError: it is a classifier, or its weights are stored in a way of which they cannot be had back.
    """
    config: Any = source.config()
    names = [*(getattr(config, "architectures", None) or []), _task_of(source)]
    if any(name.endswith(("ForSequenceClassification", "SEQ_CLS")) for name in names):
        hint = None if source.recipe is None else f"`ftcli merge {source.reference} -o OUT` writes a model folder of it"
        raise RequestError("the model cannot be exported", [Problem(source.description, "is a classifier, and no language model", hint)])
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if stored and method != "bitsandbytes":
        what = f"its weights are stored by `{method}`, and the plain ones cannot be had back"
        raise RequestError("the model cannot be exported", [Problem(source.description, what, "export the model that it was made from")])


def _task_of(source: Source) -> str:
    """What PEFT calls the kind of the model."""
    import json

    from ftcli.methods.adapter import CONFIG_FILE

    if source.recipe is not None:
        return "CAUSAL_LM" if source.recipe.objective.head is None else "SEQ_CLS"
    path = None if source.adapter is None else source.adapter / CONFIG_FILE
    return "" if path is None else str(json.loads(path.read_text(encoding="utf-8")).get("task_type"))


def chosen_device(device: str) -> str:
    """The name of the device asked for.

    Raises:
        UsageError: there is none of this name here.
    """
    import torch

    from ftcli.exporting.open_target import _device

    if device != "auto":
        return str(_device(device))
    return "cuda" if torch.cuda.is_available() else "cpu"
