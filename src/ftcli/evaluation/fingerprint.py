"""What decides a model's answers, as one hash: kept results are found by it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from ftcli.errors import RequestError

# Weights, settings, vocabularies of every kind, templates, and code that comes with a model.
SUFFIXES = (".safetensors", ".json", ".jinja", ".yaml", ".model", ".txt", ".tiktoken", ".vocab", ".bpe", ".py")


def fingerprint(target: str) -> str | None:
    """A hash of everything that decides what `target` computes: its files, the recipe of its run, and the files of the base that it
    stands on; None where it or its base is not to be had here, or is a hub id, and nothing can be kept."""
    from ftcli.models.locate import model_folder

    folder = Path(target).expanduser()
    if not folder.is_dir():
        if not target.startswith("builtin:"):
            return None
        folder = model_folder(target)
    digest = hashlib.sha256()
    try:
        for part in _parts(target, folder):
            digest.update(part.encode() + b"\n")
    except RequestError:  # the same that opening it will tell
        return None
    return digest.hexdigest()


def _parts(target: str, folder: Path) -> Iterator[str]:
    """Hashes of all that is opened with a folder, in the order in which `open_target` looks."""
    from ftcli.exporting.open_target import ADAPTER_CONFIG, CHECKPOINTS, adapter_base
    from ftcli.reporting.found_run import ARTEFACTS, is_run

    if is_run(folder):
        yield from _parts_of_run(folder, None)
    elif folder.name in ARTEFACTS and is_run(folder.parent):
        yield from _parts_of_run(folder.parent, None)
    elif folder.parent.name == CHECKPOINTS and is_run(folder.parent.parent):
        yield from _parts_of_run(folder.parent.parent, folder)
    else:
        yield _of_folder(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            yield _of_model(adapter_base(target, folder))


def _parts_of_run(run: Path, checkpoint: Path | None) -> Iterator[str]:
    """Of the run's artefact, or of a checkpoint: the last one where the run has not ended."""
    from ftcli.exporting.open_target import CHECKPOINTS
    from ftcli.recipe.load import load_recipe
    from ftcli.reporting.found_run import RESOLVED_RECIPE, has_artefact
    from ftcli.training.checkpoint import Checkpoints

    found = load_recipe(run / RESOLVED_RECIPE)
    model, kind = found.recipe.model, found.recipe.method.artefact
    yield found.text
    is_artefact = checkpoint is None and has_artefact(run, kind)
    if is_artefact:
        folder = run / kind
    else:
        checkpoints = Checkpoints(run / CHECKPOINTS, keep=1)
        steps = checkpoints.steps()
        if checkpoint is None and not steps:
            raise RequestError("the run cannot be opened")
        folder = checkpoint or checkpoints.path(steps[-1])
        if found.recipe.init_from is not None:
            yield from _parts(found.recipe.init_from.path, Path(found.recipe.init_from.path))
    yield _of_folder(folder)
    if model.base is not None and not (is_artefact and kind == "model"):
        yield _of_model(model.base, model.revision)
    if not (folder / "tokenizer.json").is_file():
        if (reference := model.tokenizer or model.base) is not None:
            yield _of_model(reference, model.revision if model.tokenizer is None else None)
        if model.template is not None and len(model.template) < 1000 and Path(model.template).is_file():
            yield Path(model.template).read_text(encoding="utf-8")


def _of_model(reference: str, revision: str | None = None) -> str:
    from ftcli.models.locate import model_folder

    folder = model_folder(reference, revision).resolve()
    return folder.name if folder.parent.name == "snapshots" else _of_folder(folder)  # a snapshot of the hub bears its commit's name


def _of_folder(folder: Path) -> str:
    from ftcli.files import sha256_of

    files = (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.name != "manifest.json" and path.is_file())
    return " ".join(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}" for path in files)
