"""Our results in the JSON of lm-evaluation-harness, for the viewers and scripts that read it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.files import json_text, write_json, write_lines

if TYPE_CHECKING:
    from ftcli.evaluation.evaluate import Evaluated
    from ftcli.evaluation.tasks import Task
    from ftcli.evaluation.tasks.task import Figure, TaskResult

NAMES = {
    "multiple-choice": {"accuracy": "acc", "accuracy_by_character": "acc_norm", "accuracy_by_byte": "acc_bytes"},
    "classification": {"accuracy": "acc", "macro_f1": "f1"},
    "preference": {"accuracy": "acc"},
}
"""What the harness calls a figure; those that are not listed keep their names."""
_LATER = frozenset({"where", "prompt", "reference", "answer"})


def write_lm_eval(folder: Path, found: Sequence[Evaluated], tasks: Sequence[Task], now: datetime) -> list[Path]:
    """A folder for each model, with `results_TIME.json` and `samples_TASK_TIME.jsonl`, as the harness names them."""
    paths = []
    for one in found:
        place = folder / re.sub(r"[\"<>:/\\|?*\[\]]+", "__", one.target)
        place.mkdir(parents=True, exist_ok=True)
        stamp = now.isoformat().replace(":", "-")
        paths.append(place / f"results_{stamp}.json")
        write_json(paths[-1], lm_eval_document(one, tasks, now))
        for task in tasks:
            write_lines(place / f"samples_{task.name}_{stamp}.jsonl", _sample_lines(task, one.results[task.name]))
    return paths


def lm_eval_document(one: Evaluated, tasks: Sequence[Task], now: datetime) -> dict[str, Any]:
    """The document of `lm_eval --output_path`, as far as it is about results; prompts and hardware are in our own files."""
    from importlib import metadata

    return {
        "results": {task.name: _results(task, one.results[task.name]) for task in tasks},
        "group_subtasks": {task.name: [] for task in tasks},
        "configs": {task.name: {"task": task.name, "output_type": task.kind, **task.model_dump(mode="json")} for task in tasks},
        "versions": {task.name: 1 for task in tasks},
        "n-shot": {task.name: _num_shots(task) for task in tasks},
        "higher_is_better": {task.name: _directions(task, one.results[task.name]) for task in tasks},
        "n-samples": {
            task.name: {"original": len(one.results[task.name].rows), "effective": len(one.results[task.name].rows)} for task in tasks
        },
        "config": {"model": "ftcli", "model_args": {"target": one.target}, "model_dtype": one.precision, "limit": None},
        "git_hash": None,
        "date": now.timestamp(),
        "transformers_version": metadata.version("transformers"),
        "lm_eval_version": None,
        "model_source": "ftcli",
        "model_name": one.target,
        "model_name_sanitized": re.sub(r"[\"<>:/\\|?*\[\]]+", "__", one.target),
        "total_evaluation_time_seconds": str(sum(one.seconds.values())),
    }


def _results(task: Task, result: TaskResult) -> dict[str, Any]:
    found: dict[str, Any] = {"name": task.name, "alias": task.name, "sample_len": len(result.rows)}
    for name, figure in result.figures.items():
        called = _called(task, name)
        found[f"{called},none"] = figure.interval.value
        found[f"{called}_stderr,none"] = _standard_error(figure)
    return found


def _standard_error(figure: Figure) -> float | str:
    """Of the mean over rows, as the harness has it; N/A for what is no plain mean."""
    import numpy as np

    if figure.values is None or figure.weights is not None or len(figure.values) < 2:
        return "N/A"
    return float(np.std(figure.values, ddof=1)) / math.sqrt(len(figure.values))


def _called(task: Task, name: str) -> str:
    return NAMES.get(task.kind, {}).get(name, name)


def _num_shots(task: Task) -> int:
    shots = getattr(task, "shots", None)
    return 0 if shots is None else int(shots.count)


def _directions(task: Task, result: TaskResult) -> dict[str, bool]:
    return {_called(task, name): figure.higher_is_better for name, figure in result.figures.items()}


def _sample_lines(task: Task, result: TaskResult) -> Iterator[bytes]:
    for place, row in enumerate(result.rows):
        answers = row.get("answers", [row.get("answer", row.get("predicted", ""))])
        likelihoods = row.get("log_likelihoods")
        responses = [[[value, False]] for value in likelihoods] if likelihoods is not None else [[answer] for answer in answers]
        document = {
            "doc_id": place,
            "doc": row,
            "target": row.get("reference", row.get("answer") if likelihoods is not None else row.get("label", "")),
            "arguments": [[row.get("prompt", row.get("text", ""))]],
            "resps": responses,
            "filtered_resps": [one[0] for one in responses],
            "filter": "none",
            "metrics": [_called(task, name) for name in result.figures if name in row],
            **{_called(task, name): row[name] for name in result.figures if name in row and name not in _LATER},
        }
        yield json_text(document).encode("utf-8", "surrogatepass") + b"\n"
