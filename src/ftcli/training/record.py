"""What a run says of itself: the manifest it begins with, and the summary that makes it finished."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ftcli.reporting.rows import mask_samples
from ftcli.training.assemble import count_parameters, model_width
from ftcli.training.checkpoint import trainable_tensors
from ftcli.training.init_from import origin_note
from ftcli.training.manifest import environment, fingerprints, template_note
from ftcli.training.proofs import Proof, hash_tensors
from ftcli.training.realised import realised_mixture

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftcli.data.store import TreeStore
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.assemble import DataParts, ModelParts
    from ftcli.training.folder import RunFolder
    from ftcli.training.loop import Progress


def first_manifest(recipe: Recipe, data: DataParts, parts: ModelParts, accelerator: Accelerator) -> dict[str, Any]:
    """What a run is, written before its first step."""
    trainable, total = count_parameters(parts.module)
    return {
        "status": "running",
        "name": recipe.name,
        "method": recipe.method.kind,
        "base": recipe.model.base,
        "base_fingerprint": parts.base_fingerprint,
        "init_from": origin_note(recipe),
        "artefact": recipe.method.artefact,
        "num_steps": data.order.num_steps,
        "steps": 0,
        "seed": recipe.train.seed,
        "lr": parts.lr,
        "parameters": {"trainable": trainable, "total": total},
        "what_trains": recipe.method.what_trains(parts.module),
        "layout": parts.layout.to_json(),
        "hashes": {**fingerprints(data), "initial_trainable": hash_tensors(trainable_tensors(parts.module).items())},
        "data": data_entries(data),
        "repeats": data.order.repeats(),
        "audit": data.prepared.audit.to_json(),
        "notes": list(data.prepared.notes),
        "mask_samples": mask_samples(recipe.objective, data.prepared.train, data.tokenizer),
        "template": template_note(recipe.model, data.tokenizer),
        "default_lr": recipe.method.lr_at(model_width(parts.module)),
        "new_tokens": None if data.new_tokens is None else data.new_tokens.to_json(),
        "environment": environment(accelerator),
        "proofs": [],
    }


def _cut(recipe: Recipe, store: TreeStore) -> str | None:
    """How the rows of an evaluation source that are too long were cut; None where none is: figures of other cuts are of other text."""
    report = store.report
    if not report.num_overlong:
        return None
    max_length = getattr(store.entry, "max_length", None) or recipe.data.max_length
    # Which rows are dropped, and how much of a prompt is, hangs on the tokens of a word, too.
    of_rows = "" if report.on_overflow == "split" else f" of {report.num_overlong} rows"
    return f"`max_length: {max_length}`, `{report.on_overflow}`{of_rows}"


def data_entries(data: DataParts) -> list[dict[str, Any]]:
    """What became of the rows of each source."""
    return [{"role": store.role, **store.report.to_json()} for store in (*data.prepared.train, *data.prepared.evaluation)]


def summary_of(
    recipe: Recipe, data: DataParts, folder: RunFolder, progress: Progress, proofs: list[Proof], seconds: float
) -> dict[str, Any]:
    """What a run has come to, written after its last step."""
    records = [json.loads(line) for line in folder.metrics_path.read_text(encoding="utf-8").splitlines()]
    evaluations = [record["sources"] for record in records if record["kind"] == "evaluate"]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    held = [record["regularizers"] for record in records if "regularizers" in record]
    return {
        "status": "finished",
        "name": recipe.name,
        "steps": progress.step,
        "best_step": progress.best_step,
        "loss": losses[-1] if losses else None,
        "before": evaluations[0] if evaluations else {},
        "after": evaluations[-1] if evaluations else {},
        **({"regularizers": held[-1]} if held else {}),
        "rows": {store.name: store.rows_key for store in data.prepared.evaluation},
        "cut": {store.name: how for store in data.prepared.evaluation if (how := _cut(recipe, store)) is not None},
        "proofs": [proof.to_json() for proof in proofs],
        "folder": str(folder.path),
        "new_tokens": None if data.new_tokens is None else data.new_tokens.summary(),
        "artefact": recipe.method.artefact,
        "merges": recipe.method.merges,
        "objective": recipe.objective.kind,
        "mixture": realised_mixture(data.prepared.train, data.order, progress, records),
        "seconds": round(progress.seconds, 3),
        "total_seconds": round(seconds, 3),
    }
