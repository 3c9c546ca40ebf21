"""Tasks on models: every figure with its interval, kept so that nothing is computed twice, and models compared row by row."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.evaluation.gates import Measured
from ftcli.evaluation.statistics import Comparison, Interval, compare, holm
from ftcli.evaluation.tasks.task import Figure, Subject, TaskResult
from ftcli.files import recover, write_text

if TYPE_CHECKING:
    from ftcli.evaluation.tasks import Task
    from ftcli.exporting.open_target import Loaded

FORMAT = 1
"""Of kept results; a change of what a task computes raises it."""
BATCH_TOKENS = 8192


@dataclass(slots=True)
class Evaluated:
    """One model's results by task."""

    target: str
    description: str
    precision: str
    """How the weights were computed with."""
    results: dict[str, TaskResult]
    seconds: dict[str, float]
    reused: list[str]
    """Tasks whose results were there already."""

    def measured(self) -> dict[str, dict[str, Measured]]:
        """For gates."""
        return {
            task: {name: Measured(figure.interval.value, figure.values) for name, figure in result.figures.items()}
            for task, result in self.results.items()
        }


@dataclass(frozen=True, slots=True)
class Change:
    """A task's figure of two models, on the same rows."""

    task: str
    figure: str
    comparison: Comparison
    adjusted_p: float
    """Holm's, over the tasks."""
    is_better: bool
    lost: list[str]
    """Rows that only the base has right."""
    gained: list[str]
    kept: int
    """Rows that both have right."""

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "figure": self.figure,
            **self.comparison.to_json(),
            "adjusted_p": self.adjusted_p,
            "is_better": self.is_better,
            "lost": self.lost,
            "gained": self.gained,
            "kept": self.kept,
        }


def evaluate(
    target: str,
    tasks: Sequence[Task],
    *,
    cache: Path | None,
    device: str = "auto",
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Evaluated:
    """Measure every task on one model; it is loaded once, and not at all if everything is kept already.

    Args:
        target: a run, a checkpoint, a folder with a model or an adapter, builtin:NAME, or a hub id.
        cache: folder of kept results; None keeps nothing.

    Raises:
        FtcliError: the model cannot be opened, or a row cannot be read.
    """
    if cache is not None and cache.is_dir():
        recover(cache)
    subject: Subject | None = None
    loaded: Loaded | None = None
    weights = fingerprint(target) if cache is not None else None
    found = Evaluated(target, target, "", {}, {}, [])
    for task in tasks:
        kept = None if cache is None or weights is None else cache / f"{_key(weights, task)}.json"
        if kept is not None and (old := _read_kept(kept)) is not None:
            found.results[task.name], about = old
            found.description, found.precision = about["description"], about["precision"]
            found.seconds[task.name] = 0.0
            found.reused.append(task.name)
            continue
        if subject is None:
            loaded, subject = open_subject(target, device)
            found.description, found.precision = loaded.description, precision_of(loaded)
        began = time.monotonic()
        told = Subject(subject.model, subject.tokenizer, subject.batch_tokens, _telling(progress, f"{task.name}: {Path(target).name}"))
        found.results[task.name] = task.measure(told)
        found.seconds[task.name] = time.monotonic() - began
        if kept is not None:
            _keep(kept, found.results[task.name], {"description": found.description, "precision": found.precision, "target": target})
    return found


def _telling(progress: Callable[[int, int, str], None], what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, what)


def open_subject(target: str, device: str = "auto") -> tuple[Loaded, Subject]:
    """A model ready for tasks, in the layout that a probe of it allows."""
    import numpy as np

    from ftcli.data.tree import SPAN, path_tree
    from ftcli.exporting.open_target import open_target
    from ftcli.layout.model import TreeModel
    from ftcli.layout.probe import choose_layout

    loaded = open_target(target, device=device)
    model = TreeModel(loaded.model)
    tokens = np.array(loaded.tokenizer.encode("A probe of both layouts, with a few words in it. " * 4)[0], dtype=np.int32)
    trees = [path_tree(tokens[:size], np.zeros(0, dtype=SPAN), 0, 0) for size in (len(tokens), len(tokens) // 2)]
    choose_layout(model, trees, "auto", frozenset({"forest", "rows"}), len(tokens))
    return loaded, Subject(model, loaded.tokenizer, BATCH_TOKENS, lambda done, total: None)


def precision_of(loaded: Loaded) -> str:
    """The dtype of the weights and how they are quantised: figures of a quantised model are another model's."""
    from ftcli.layout.model import inner_model

    model = inner_model(loaded.model)
    dtype = str(model.dtype).removeprefix("torch.")
    quantisation = getattr(model.config, "quantization_config", None)
    return dtype if quantisation is None else f"{dtype}, quantised ({getattr(quantisation, 'quant_method', 'unknown')})"


def fingerprint(target: str) -> str | None:
    """A hash of everything that decides what `target` computes; None where it is not a folder here."""
    from ftcli.files import sha256_of
    from ftcli.models.locate import model_folder

    folder = Path(target).expanduser()
    if not folder.is_dir():
        if not target.startswith("builtin:"):
            return None
        folder = model_folder(target)
    digest = hashlib.sha256(str(FORMAT).encode())
    for path in sorted(folder.rglob("*")):
        is_weights = path.suffix in (".safetensors", ".json", ".jinja", ".yaml")
        # A run's checkpoints and logs change without its result changing.
        if path.is_file() and is_weights and "checkpoints" not in path.relative_to(folder).parts and path.name != "manifest.json":
            digest.update(path.relative_to(folder).as_posix().encode() + sha256_of(path).encode())
    return digest.hexdigest()


def _key(weights: str, task: Task) -> str:
    """The name of a kept result: weights, settings and the rows' bytes."""
    settings = json.dumps(task.model_dump(mode="json"), sort_keys=True)
    shots = getattr(task, "shots", None)
    others = shots.source.fingerprint() if shots is not None and shots.source is not None else ""
    return hashlib.sha256(f"{FORMAT}\n{weights}\n{settings}\n{task.source.fingerprint()}\n{others}".encode()).hexdigest()[:32]


def _keep(path: Path, result: TaskResult, about: dict[str, str]) -> None:
    figures = {
        name: {**figure.to_json(), "values": None if figure.values is None else figure.values.tolist()}
        for name, figure in result.figures.items()
    }
    document = {"about": about, "figures": figures, "rows": result.rows, "notes": result.notes, "tokens": result.tokens}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document))


def _read_kept(path: Path) -> tuple[TaskResult, dict[str, str]] | None:
    """A kept result; None if there is none, or a killed process left half of one."""
    import numpy as np

    if not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    figures = {
        name: Figure(
            Interval(one["value"], one["low"], one["high"]),
            None if one["values"] is None else np.array(one["values"], dtype=np.float64),
            one["higher_is_better"],
        )
        for name, one in document["figures"].items()
    }
    return TaskResult(figures, document["rows"], document["notes"], document["tokens"]), document["about"]


def changes(tuned: Evaluated, base: Evaluated, tasks: Sequence[Task]) -> list[Change]:
    """What `tuned` does better and worse than `base`, by each task's main figure, paired over its rows, with Holm's correction."""
    compared = []
    for task in tasks:
        name = main_figure(task, tuned.results[task.name])
        after, before = tuned.results[task.name].figures[name], base.results[task.name].figures[name]
        if after.values is not None and before.values is not None and len(after.values) == len(before.values):
            compared.append((task, name, after, before, compare(after.values, before.values)))
    adjusted = holm([found.p_value for *_, found in compared])
    return [
        _change(task.name, name, (after, before), found, p_value, [str(row["where"]) for row in tuned.results[task.name].rows])
        for (task, name, after, before, found), p_value in zip(compared, adjusted, strict=True)
    ]


def _change(task: str, name: str, both: tuple[Figure, Figure], found: Comparison, p_value: float, rows: Sequence[str]) -> Change:
    after, before = both
    assert after.values is not None
    assert before.values is not None
    sign = 1 if after.higher_is_better else -1
    moved = sign * (after.values - before.values)
    return Change(
        task=task,
        figure=name,
        comparison=found,
        adjusted_p=p_value,
        is_better=sign * found.difference.value > 0,
        lost=[where for where, move in zip(rows, moved, strict=True) if move < 0],
        gained=[where for where, move in zip(rows, moved, strict=True) if move > 0],
        kept=int(((after.values == 1) & (before.values == 1)).sum()),
    )


def main_figure(task: Task, result: TaskResult) -> str:
    """The figure that models are compared by."""
    return task.main_figure or next(iter(result.figures))
