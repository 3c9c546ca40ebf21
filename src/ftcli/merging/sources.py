"""Where the models of a merge come from: folders, the hub, embedded models, runs, checkpoints, and any of these with an adapter.

Opening a source reads configurations and headers, no weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftcli.errors import Problem, RequestError
from ftcli.merging.adapters import CONFIG_FILE, Adapter, open_adapter
from ftcli.merging.documents import read_object
from ftcli.merging.remote import has_weights, header_tensors
from ftcli.merging.stored import StoredTensor, folder_tensors, read_header
from ftcli.merging.tied_head import untied
from ftcli.models.layer_lists import NUM_LAYERS_KEYS
from ftcli.models.locate import model_folder

RUN_FILE, TRAINED_FILE = "recipe.resolved.yaml", "trainable.safetensors"


@dataclass(frozen=True)
class Source:
    """One model, opened."""

    reference: str
    """As the recipe says it."""
    folder: Path
    """With its configuration and tokenizer."""
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    adapter: Adapter | None = None
    remote: str | None = None
    """The hub id of weights that are not here yet: their shapes and dtypes are known, and none can be read."""
    doubt: str | None = None
    """Why its adapter may not belong to its base."""
    hub_ids: tuple[str, ...] = ()
    """What of the model, and of its adapter, is on the hub, by the names it has there; nothing that is a folder here."""
    folders: tuple[str, ...] = ()
    """What of it is a folder here, as the recipe says it."""

    def tensor(self, name: str) -> StoredTensor:
        """The stored tensor of that name, the adapter's own copy where it has one."""
        if self.adapter is not None and name in self.adapter.replaced:
            return self.adapter.replaced[name]
        return self.tensors[name]

    def is_as_stored(self, name: str) -> bool:
        """True when nothing is to be computed to have the tensor."""
        return self.adapter is None or name not in self.adapter.low_rank

    @property
    def files(self) -> list[Path]:
        """Every file that weights are read from."""
        paths = {tensor.path for tensor in self.tensors.values()}
        if self.adapter is not None:
            paths |= set((self.adapter.folder).glob("*.safetensors")) | {self.adapter.folder / CONFIG_FILE}
        return sorted(paths)

    @property
    def shown(self) -> str:
        """The reference without the folders of this machine: of a folder its name only."""
        shown = self.reference
        for folder in sorted(self.folders, key=len, reverse=True):
            shown = shown.replace(folder, Path(folder).name or folder)
        return shown

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder where it brings a tokenizer of its own, else the model's."""
        if self.adapter is not None and (self.adapter.folder / "tokenizer.json").is_file():
            return self.adapter.folder
        return self.folder


def open_source(reference: str, folder: Path, *, to_plan: bool = False) -> Source:
    """The model that a recipe calls `reference`: `model`, `model@revision`, `model+adapter`.

    Args:
        folder: the recipe's; relative paths count from it, and where nothing is there from the working folder.
        to_plan: of a model on the hub only the headers of its weights are fetched (see `remote`).

    Raises:
        RequestError: there is no such model, or it cannot be merged.
    """
    model, adapter = _split_adapter(reference, folder)
    source = _open_hub(reference, model, folder) if to_plan else None
    path = _located(model, folder) if source is None else source.folder
    source = source or _open_folder(reference, path, folder)
    parts = [model] if adapter is None else [model, adapter]
    hub_ids = {part: _hub_id(part, folder) for part in parts}
    folders = [part for part, hub_id in hub_ids.items() if hub_id is None and not part.startswith("builtin:")]
    source = replace(source, hub_ids=tuple(hub_id for hub_id in hub_ids.values() if hub_id is not None), folders=tuple(folders))
    if adapter is None:
        return source
    if source.adapter is not None:
        raise RequestError("a model has two adapters", [Problem(reference, f"`{path}` has an adapter of its own", "merge it first")])
    adapter_path = _local(adapter, folder)
    if adapter_path is None:
        adapter_path = model_folder(*_split_revision(adapter))
    if (adapter_path / "adapter" / CONFIG_FILE).is_file():
        adapter_path = adapter_path / "adapter"
    adapted = _with_adapter(source, adapter_path)
    return replace(adapted, doubt=_doubt(model, path, adapted.adapter.base if adapted.adapter is not None else None))


def _doubt(model: str, path: Path, noted: str | None) -> str | None:
    """Why an adapter may not belong to the model it is added to: it was trained on one of another name.

    Args:
        model: as the recipe says it.
        path: the folder it was found in.
        noted: the base that the adapter's configuration names.
    """
    if noted is None or noted == model or noted == _split_revision(model)[0]:
        return None
    here = Path(noted).expanduser()
    if os.path.isdir(here):
        if here.resolve() == path.resolve():
            return None
    elif _last_name(noted) in (_last_name(_split_revision(model)[0]), path.name.lower()):
        return None  # a copy, or the folder of another machine
    return f"the adapter was trained on `{noted}`, and is added to `{model}`: on another model it means something else"


def _last_name(reference: str) -> str:
    return re.split(r"[/:]", reference.rstrip("/"))[-1].lower()


def _open_hub(reference: str, model: str, folder: Path) -> Source | None:
    """The model on the hub, by its headers where its weights are not here; None where it is another kind of model."""
    name, revision = _split_revision(model)
    if name.startswith(("builtin:", ".")) or _local(model, folder) is not None or _local(name, folder) is not None:
        return None
    path = model_folder(name, revision, weights=False)
    if has_weights(path) or not (path / "config.json").is_file():
        return None
    return Source(reference, path, _configuration(reference, path), header_tensors(name, path), remote=name)


def _split_adapter(reference: str, folder: Path) -> tuple[str, str | None]:
    """A path may have a plus sign in it: what is there as it stands is meant as it stands."""
    if "+" not in reference or _local(reference, folder) is not None:
        return reference, None
    for position in (index for index, character in enumerate(reference) if character == "+"):
        model, adapter = reference[:position], reference[position + 1 :]
        if _local(adapter, folder) is not None:
            return model, adapter
    model, _, adapter = reference.partition("+")
    return model, adapter


def _split_revision(reference: str) -> tuple[str, str | None]:
    name, separator, revision = reference.partition("@")
    return name, revision if separator else None


def _local(reference: str, folder: Path) -> Path | None:
    path = Path(reference).expanduser()
    candidates = [path] if path.is_absolute() else [folder / path, path]
    # pathlib raises where a name is too long for a file
    return next((candidate for candidate in candidates if os.path.isdir(candidate)), None)


def _hub_id(reference: str, folder: Path) -> str | None:
    """The name of a model or adapter on the hub, without a revision; None for what is here."""
    name = _split_revision(reference)[0]
    is_here = _local(reference, folder) is not None or _local(name, folder) is not None
    return None if is_here or name.startswith(("builtin:", ".", "/", "~")) else name


def _located(model: str, folder: Path) -> Path:
    local = None if model.startswith("builtin:") else _local(model, folder)
    if local is not None:
        return local
    name, revision = _split_revision(model)
    if not name.startswith("builtin:") and (local := _local(name, folder)) is not None:
        return local
    if name.startswith("."):
        name = str(folder / name)
    return model_folder(name, revision)


def _open_folder(reference: str, path: Path, recipe_folder: Path) -> Source:
    if (path / RUN_FILE).is_file():
        return _open_run(reference, path, recipe_folder)
    if (path / TRAINED_FILE).is_file():
        return _open_checkpoint(reference, path)
    if (path / CONFIG_FILE).is_file() and not (path / "config.json").is_file():
        base = read_object(path / CONFIG_FILE, reference).get("base_model_name_or_path")
        hint = f"write `{base or 'BASE'}+{reference}`"
        raise RequestError("an adapter is no model", [Problem(reference, f"`{path}` holds an adapter", hint)])
    return Source(reference, path, _configuration(reference, path), folder_tensors(path))


def _configuration(reference: str, path: Path) -> dict[str, Any]:
    """
    Raises:
        RequestError: it cannot be read, or its weights are quantised.
    """
    config = read_object(path / "config.json", reference)
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method", "quantised") if isinstance(quantisation, dict) else "quantised"
        hint = "merge the weights it was made from"
        raise RequestError("a model cannot be merged", [Problem(reference, f"its weights are quantised ({method})", hint)])
    inner = config.get("text_config")
    for key in NUM_LAYERS_KEYS:
        value = (inner if isinstance(inner, dict) else config).get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError("a model cannot be read", [Problem(reference, f"its `{key}` is {value!r}, allowed: a whole number", None)])
    return config


def _open_run(reference: str, run: Path, recipe_folder: Path) -> Source:
    if (run / "model" / "config.json").is_file():
        return _open_folder(reference, run / "model", recipe_folder)
    if not (run / "adapter" / CONFIG_FILE).is_file():
        hint = f"finish it with `ftcli train {run} --resume`, or name one of its checkpoints"
        raise RequestError("a run is not finished", [Problem(reference, f"`{run}` has neither model/ nor adapter/", hint)])
    method, base, revision = _base_of_run(run)
    if method == "qlora":
        hint = f"`ftcli merge {run}` folds it in; name the folder this makes"
        what = "its adapter was trained on a quantised base, and is another model on the original one"
        raise RequestError("a run cannot be merged as it is", [Problem(reference, what, hint)])
    if base is None:
        raise RequestError("a run has no base", [Problem(reference, "its base was made of random weights", f"use `ftcli merge {run}`")])
    return _with_adapter(_open_folder(reference, model_folder(base, revision), recipe_folder), run / "adapter")


def _base_of_run(run: Path) -> tuple[str | None, str | None, str | None]:
    """The kind of method, the base model and its revision, from the recipe a run was made with."""
    from ftcli.recipe.yaml import YamlError, parse

    try:
        data = parse((run / RUN_FILE).read_text(encoding="utf-8")).data
    except (OSError, ValueError, YamlError) as error:
        raise RequestError("a run cannot be read", [Problem(str(run), f"`{RUN_FILE}`: {error}", None)]) from None
    model, method = data.get("model"), data.get("method")
    model, method = model if isinstance(model, dict) else {}, method if isinstance(method, dict) else {}
    return method.get("kind"), model.get("base"), model.get("revision")


def _open_checkpoint(reference: str, checkpoint: Path) -> Source:
    """A checkpoint of full fine-tuning: the base with the trained tensors in their places."""
    run = checkpoint.parent.parent
    if not (run / RUN_FILE).is_file():
        raise RequestError("a checkpoint has no run", [Problem(reference, f"`{run}` has no {RUN_FILE}", None)])
    _, base, revision = _base_of_run(run)
    trained = read_header(checkpoint / TRAINED_FILE)
    if base is None or any("lora_" in name for name in trained):
        hint = f"`ftcli merge {run} --checkpoint {checkpoint.name} -o FOLDER` makes a model of it; name that folder"
        raise RequestError("a checkpoint is no whole model", [Problem(reference, "it holds what was trained only", hint)])
    source = _open_folder(reference, model_folder(base, revision), run)
    if strangers := sorted(set(trained) - set(source.tensors)):
        raise RequestError("a checkpoint does not fit its base", [Problem(reference, f"not in the base: {', '.join(strangers[:5])}", None)])
    return Source(reference, source.folder, source.config, {**source.tensors, **trained})


def _with_adapter(source: Source, folder: Path) -> Source:
    adapter = open_adapter(folder, source.tensors, source.config)
    if adapter.own_head is None:
        return replace(source, adapter=adapter)
    return replace(source, adapter=adapter, config=untied(source.config), tensors=adapter.own_head.apart(source.tensors))
