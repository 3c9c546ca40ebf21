"""The trained approaches of a comparison: ordinary runs, named by their recipe and data, so that they are found again."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.settings import Data, TrainSource
from ftcli.data.sources.file import File
from ftcli.evaluation.tasks.task import Subject
from ftcli.files import write_text
from ftcli.models.settings import Model
from ftcli.recipe.recipe import Recipe

if TYPE_CHECKING:
    from ftcli.evaluation.approaches.recipe import Comparison, FineTuning
    from ftcli.reporting.live import Reporter


def train_approach(
    comparison: Comparison, approach: FineTuning, folder: Path, reporter: Reporter, device: str
) -> tuple[Path, dict[str, Any]]:
    """The run of an approach, trained now, gone on with, or found finished; and what it took.

    Raises:
        RequestError: something in its settings or data is wrong.
        RunError: it failed.
        InterruptedRun: a signal stopped it.
    """
    from ftcli.recipe.load import load_recipe
    from ftcli.recipe.write import resolved_yaml
    from ftcli.training.run import run_recipe

    sources = comparison.train
    if approach.retrieve is not None and approach.passages_in_training:
        sources = _with_passages(comparison, approach, folder, device)
    recipe = _recipe(comparison, approach, sources)
    path = folder / "recipes" / f"{approach.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    # Of what was written, not of every default: a later version with one setting more finds the run again, and resuming checks the rest.
    digest = hashlib.sha256(json.dumps(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=True).encode())
    digest.update(" ".join(entry.source.fingerprint() for entry in sources).encode())
    run = folder / "runs" / f"{approach.name}-{digest.hexdigest()[:8]}"
    write_text(path, resolved_yaml(recipe.model_copy(update={"output": str(run)})))
    summary = run_recipe(load_recipe(path), reporter, resume=True)
    return run, _cost(run, recipe, summary)


def _recipe(comparison: Comparison, approach: FineTuning, sources: tuple[TrainSource, ...]) -> Recipe:
    data = Data(train=sources, holdout=0.0, max_length=comparison.max_length)
    name = f"{comparison.name}-{approach.name}"
    return Recipe(version=1, name=name, model=Model(base=comparison.base), data=data, method=approach.method, train=approach.train)


def _cost(run: Path, recipe: Recipe, summary: dict[str, Any]) -> dict[str, Any]:
    """What training took, from what the run says of itself."""
    from ftcli.reporting.found_run import read_metrics

    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    records = read_metrics(run / "metrics.jsonl").of_kind("train")
    artefact = run / recipe.method.artefact
    return {
        "run": str(run),
        "method": recipe.method.kind,
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "tokens": records[-1]["tokens"] if records else 0,
        "trainable": manifest["parameters"]["trainable"],
        "bytes": sum(path.stat().st_size for path in artefact.glob("*.safetensors")),
        "artefact": recipe.method.artefact,
    }


def _with_passages(comparison: Comparison, approach: FineTuning, folder: Path, device: str) -> tuple[TrainSource, ...]:
    """The new training rows with passages in front of their questions, as files; made once for the same data and settings."""
    assert approach.retrieve is not None
    made: list[TrainSource] = []
    subject: Subject | None = None
    for index, entry in enumerate(comparison.train):
        if entry.role != "new":
            made.append(entry)
            continue
        about = [approach.retrieve.model_dump_json(), approach.retrieve.fingerprint(), entry.model_dump_json(), entry.source.fingerprint()]
        about += [comparison.base, str(comparison.max_length), comparison.task.model_dump_json()]
        path = folder / "rows" / f"{approach.name}-{index}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]}.jsonl"
        if not path.is_file():
            if subject is None:
                from ftcli.evaluation.evaluate import open_subject

                subject = open_subject(comparison.base, device)[1]
            write_text(path, "".join(_asked_with_passages(comparison, approach, entry, folder, subject)))
        changes: dict[str, Any] = {"source": File(path=str(path)), "limit": None, "name": entry.name or entry.source.label()}
        made.append(entry.model_copy(update=changes))
    return tuple(made)


def _asked_with_passages(comparison: Comparison, approach: FineTuning, entry: TrainSource, folder: Path, subject: Subject) -> list[str]:
    """Lines of JSON."""
    from ftcli.evaluation.measurement import with_passages
    from ftcli.evaluation.tasks.generation import Generation
    from ftcli.metrics.exact_match import ExactMatch

    assert approach.retrieve is not None
    answer_tokens = getattr(comparison.task, "max_new_tokens", 128)
    task = Generation(
        name=approach.name,
        kind="generation",
        source=entry.source,
        format=entry.format,
        metrics=(ExactMatch(),),
        max_new_tokens=answer_tokens,
        retrieve=approach.retrieve,
    )
    rows = list(islice(entry.source.rows(), entry.limit))
    passages = approach.retrieve.open(folder / "kept" / "passages")
    found = with_passages(task, task, rows, subject, passages, without_own=True, limit=comparison.max_length)
    return [json.dumps(row, ensure_ascii=False, default=str) + "\n" for _, row in found]
