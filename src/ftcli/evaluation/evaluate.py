"""Tasks on models: every figure with its interval, kept so that nothing is computed twice, and models compared row by row."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.evaluation.fingerprint import fingerprint
from ftcli.evaluation.gates import Measured
from ftcli.evaluation.measurement import check_task, main_figure, measure_task
from ftcli.evaluation.rows import Rows
from ftcli.evaluation.statistics import Comparison, Interval, holm
from ftcli.evaluation.tasks.task import Figure, Subject, TaskResult
from ftcli.files import recover, write_lines, write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.evaluation.tasks import Task
    from ftcli.evaluation.user_metrics import UserMetric
    from ftcli.exporting.open_target import Loaded
    from ftcli.recipe.recipe import Recipe

    Values = NDArray[np.float64]

FORMAT = 5
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
            task: {name: Measured(figure.interval.value, figure.values, figure.weights) for name, figure in result.figures.items()}
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
    groups: list[dict[str, Any]]
    """Of a task with `group_by`: the change of every group, with Holm's p over them."""
    clean: Comparison | None
    """The same on the rows that do not stand in the tuned model's training data, where that was looked at."""

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
            **({"groups": self.groups} if self.groups else {}),
            **({"clean": self.clean.to_json()} if self.clean is not None else {}),
        }


def evaluate(
    target: str,
    tasks: Sequence[Task],
    *,
    cache: Path | None,
    device: str = "auto",
    allow_code: bool = False,
    user_metrics: tuple[UserMetric, ...] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Evaluated:
    """Measure every task on one model; it is loaded once, and not at all if everything is kept already. All rows of all tasks are read
    before the first is measured.

    Args:
        target: a run, a checkpoint, a folder with a model or an adapter, builtin:NAME, or a hub id.
        cache: folder of kept results; None keeps nothing.
        allow_code: programs that the model writes may be run, which tasks of the kind `code` need.
        user_metrics: they score every generation task, beside its own metrics.

    Raises:
        FtcliError: the model cannot be opened, a row cannot be read, or programs may not be run.
    """
    from ftcli.evaluation.tasks.code import Code

    if cache is not None and cache.is_dir():
        recover(cache)
    weights = fingerprint(target) if cache is not None else None
    trained_on = training_rows(target) if any(task.leakage is not None and not task.leakage.train for task in tasks) else []
    found = Evaluated(target, target, "", {}, {}, [])
    missing: list[tuple[Task, Path | None]] = []
    for task in tasks:
        kept = None if cache is None or weights is None else cache / f"{_key(weights, task, trained_on, user_metrics)}.json"
        if kept is not None and (old := _read_kept(kept)) is not None:
            found.results[task.name], about = old
            found.description, found.precision = about["description"], about["precision"]
            found.seconds[task.name] = 0.0
            found.reused.append(task.name)
        else:
            missing.append((task, kept))
    if not missing:
        return found
    for task, _ in missing:
        if isinstance(task, Code):
            task.require_permission(allow_code)
    loaded, subject = open_subject(target, device)
    found.description, found.precision = loaded.description, precision_of(loaded)
    subject = replace(subject, allow_code=allow_code, user_metrics=user_metrics)
    for task, _ in missing:
        check_task(task, subject)
    for task, kept in missing:
        began = time.monotonic()
        told = replace(subject, progress=_telling(progress, f"{task.name}: {Path(target).name}"))
        indices = None if cache is None else cache / "passages"
        found.results[task.name] = measure_task(task, told, trained_on=trained_on, cache=indices)
        found.seconds[task.name] = time.monotonic() - began
        if kept is not None:
            _keep(kept, found.results[task.name], {"description": found.description, "precision": found.precision, "target": target})
    found.results = {task.name: found.results[task.name] for task in tasks}
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


@dataclass(frozen=True)
class TrainedOn:
    """The rows that a run has trained on; they are put together when they are asked for."""

    run: Path
    steps: int

    @cached_property
    def _recipe(self) -> Recipe:
        from ftcli.recipe.load import load_recipe
        from ftcli.reporting.found_run import RESOLVED_RECIPE

        return load_recipe(self.run / RESOLVED_RECIPE).recipe

    @cached_property
    def _listed(self) -> list[tuple[str, dict[str, Any]]]:
        from ftcli.training.seen import rows_seen

        return list(rows_seen(self._recipe, self.steps))

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, row)

        Raises:
            RequestError: the data cannot be read any more.
        """
        return iter(self._listed)

    def fingerprint(self) -> str:
        """Hash of the data's bytes and of what decides which of its rows are drawn."""
        recipe = self._recipe
        drawn = [recipe.data.model_dump_json(), recipe.train.model_dump_json(), str(self.steps)]
        about = "\n".join([*drawn, *(entry.source.fingerprint() for entry in recipe.data.train)])
        return hashlib.sha256(about.encode()).hexdigest()


def training_rows(target: str) -> list[TrainedOn]:
    """What the run that `target` is, or is in, has trained on; of a checkpoint, up to it; empty for other models."""
    from ftcli.reporting.found_run import is_run, read_run

    place = Path(target).expanduser()
    run = next((folder for folder in (place, *list(place.resolve().parents)[:2]) if folder.is_dir() and is_run(folder)), None)
    if run is None:
        return []
    step = re.fullmatch(r"step-(\d+)", place.name)
    return [TrainedOn(run, int(step[1]) if step else read_run(run).step)]


def _key(weights: str, task: Task, trained_on: Sequence[TrainedOn], user_metrics: Sequence[UserMetric]) -> str:
    """The name of a kept result: weights, settings, the bytes of all rows, and of the user's metrics where they are computed."""
    settings = json.dumps(task.model_dump(mode="json"), sort_keys=True)
    learnt = trained_on if task.leakage is not None and not task.leakage.train else []
    others = " ".join([*task.fingerprints(), *(source.fingerprint() for source in learnt)])
    if task.kind == "generation":
        others += "".join(sorted({metric.path.read_text(encoding="utf-8") for metric in user_metrics}))
    return hashlib.sha256(f"{FORMAT}\n{weights}\n{settings}\n{task.source.fingerprint()}\n{others}".encode()).hexdigest()[:32]


def _keep(path: Path, result: TaskResult, about: dict[str, str]) -> None:
    figures = {
        name: {**figure.to_json(), "values": _listed(figure.values), "weights": _listed(figure.weights)}
        for name, figure in result.figures.items()
    }
    document = {"about": about, "figures": figures, "notes": result.notes, "tokens": result.tokens, "details": result.details}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = result.rows if isinstance(result.rows, Rows) else Rows(result.rows)
    write_lines(path.with_suffix(".jsonl"), rows.lines())  # first: a result without its rows is none
    write_text(path, json.dumps({**document, "rows": _file_digest(path.with_suffix(".jsonl"))}))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(values: NDArray[np.float64] | None) -> list[float] | None:
    return None if values is None else values.tolist()


def _array(values: list[float] | None) -> NDArray[np.float64] | None:
    import numpy as np

    return None if values is None else np.array(values, dtype=np.float64)


def _read_kept(path: Path) -> tuple[TaskResult, dict[str, str]] | None:
    """A kept result; None if there is none, or what is there is damaged: it is measured again."""
    listed = path.with_suffix(".jsonl")
    if not path.is_file() or not listed.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["rows"] != _file_digest(listed):
            return None
        figures = {name: _figure_of(one) for name, one in document["figures"].items()}
        about = {name: str(document["about"][name]) for name in document["about"]}
        result = TaskResult(figures, Rows.of_file(listed), document["notes"], document["tokens"], document["details"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return result, about


def _figure_of(kept: dict[str, Any]) -> Figure:
    interval = Interval(kept["value"], kept["low"], kept["high"])
    return Figure(interval, _array(kept["values"]), kept["higher_is_better"], _array(kept["weights"]))


def changes(tuned: Evaluated, base: Evaluated, tasks: Sequence[Task]) -> list[Change]:
    """What `tuned` does better and worse than `base`, by each task's main figure, paired over its rows, with Holm's correction."""
    compared = []
    for task in tasks:
        name = main_figure(task, tuned.results[task.name])
        after, before = tuned.results[task.name].figures[name], base.results[task.name].figures[name]
        if (found := after.against(before)) is not None:
            compared.append((task, name, after, before, found))
    adjusted = holm([found.p_value for *_, found in compared])
    return [
        _change(task.name, name, (after, before), found, p_value, tuned.results[task.name])
        for (task, name, after, before, found), p_value in zip(compared, adjusted, strict=True)
    ]


def _change(task: str, name: str, both: tuple[Figure, Figure], found: Comparison, p_value: float, result: TaskResult) -> Change:
    after, before = both
    rows = [str(row["where"]) for row in result.rows]
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
        groups=_group_changes(after, before, result.details.get("groups")),
        clean=_clean_change(after, before, rows, result.details.get("clean")),
    )


def _group_changes(after: Figure, before: Figure, groups: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Which groups of rows moved."""
    import numpy as np

    of_rows = np.array(groups["rows"] if groups is not None else [])
    if after.values is None or len(of_rows) != len(after.values):
        return []
    found = {name: one for name in sorted(set(of_rows.tolist())) if (one := after.against(before, of_rows == name)) is not None}
    adjusted, sign = holm([one.p_value for one in found.values()]), 1 if after.higher_is_better else -1
    return [
        {"group": name, **one.to_json(), "adjusted_p": p_value, "is_better": sign * one.difference.value > 0}
        for (name, one), p_value in zip(found.items(), adjusted, strict=True)
    ]


def _clean_change(after: Figure, before: Figure, rows: Sequence[str], clean: dict[str, Any] | None) -> Comparison | None:
    """The comparison without the rows that stand in training data; None where none does."""
    import numpy as np

    leaked = {hit["where"] for hit in clean["leaked"]} if clean is not None else set()
    is_clean = np.array([where not in leaked for where in rows], dtype=bool)
    return after.against(before, is_clean) if leaked else None


def divergences(target: str, base: str, tasks: Sequence[Task], *, cache: Path | None, device: str = "auto") -> dict[str, Figure]:
    """KL(base || target) in nats a token for every task with `kl_from_base`; kept as figures are. Tasks are left out where the two
    have different vocabularies.

    Raises:
        RequestError: a model cannot be opened, or predicts with several soft prompts at once.
    """
    from ftcli.evaluation.divergence import kl_from_base
    from ftcli.evaluation.tasks.language_modelling import LanguageModelling

    wanted = [task for task in tasks if isinstance(task, LanguageModelling) and task.kl_from_base]
    weights = [fingerprint(one) for one in (target, base)] if cache is not None else [None, None]
    found: dict[str, Figure] = {}
    subjects: list[Subject] = []
    for task in wanted:
        key = None if None in weights else _key("\n".join(map(str, weights)), task, [], ())
        kept = None if cache is None or key is None else cache / f"kl-{key}.json"
        if kept is not None and (old := _read_kept(kept)) is not None:
            found[task.name] = old[0].figures["kl"]
            continue
        subjects = subjects or [open_subject(one, device)[1] for one in (base, target)]
        figure = kl_from_base(task, subjects[0], subjects[1])
        if figure is None:
            continue
        found[task.name] = figure
        if kept is not None:
            _keep(kept, TaskResult({"kl": figure}, []), {"target": target, "base": base})
    return found
