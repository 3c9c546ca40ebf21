"""A comparison from its settings to numbers: train what has to be trained, measure everything on the same rows, time requests.

Whatever was computed is kept in the comparison's folder and found again: runs by their recipe and data, figures by weights, settings
and rows. A comparison that was killed goes on with what it had not finished.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import InterruptedRun
from ftcli.evaluation.approaches.recipe import Approach, Comparison, FewShot, FineTuning, Prompting, Retrieval
from ftcli.evaluation.approaches.shared import Shared, find_shared
from ftcli.evaluation.approaches.train import train_approach
from ftcli.evaluation.evaluate import Evaluated, evaluate, open_subject
from ftcli.evaluation.fingerprint import fingerprint
from ftcli.evaluation.measurement import main_figure
from ftcli.evaluation.tasks.generation import Generation
from ftcli.evaluation.tasks.shots import Shots
from ftcli.files import write_json, write_text

if TYPE_CHECKING:
    from ftcli.data.sources.file import File
    from ftcli.evaluation.tasks import Task
    from ftcli.evaluation.tasks.retrieve import Retrieve
    from ftcli.evaluation.tasks.task import Subject, TaskResult
    from ftcli.reporting.live import Reporter

CHOOSE_ON = 100
"""Training rows on which a prompt is chosen, unless the settings say otherwise."""
COUNTED_PROMPTS = 200
CHANGED = "-after-the-change"


@dataclass(slots=True)
class Solved:
    """One approach, measured."""

    approach: Approach
    target: str
    """The model that answers: the base, or a run."""
    result: TaskResult
    figure: str
    precision: str
    changed: TaskResult | None = None
    retained: dict[str, TaskResult] = field(default_factory=dict)
    prompt_tokens: float = 0.0
    answer_tokens: float = 0.0
    """Tokens of a request, on average; of kinds that generate nothing, all of them are the prompt's."""
    timing: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    extra_bytes: int = 0
    """What must be kept beside the base: weights, an index."""

    @property
    def retrieve(self) -> Retrieve | None:
        return getattr(self.approach, "retrieve", None)

    @property
    def is_trained(self) -> bool:
        return isinstance(self.approach, FineTuning)


def conduct(
    comparison: Comparison, text: str, reporter: Reporter, device: str = "auto"
) -> tuple[list[Solved], dict[str, TaskResult], Shared]:
    """Every approach of the comparison, measured, in their order; what the base does on the retained tasks; and which rows of the task
    the approaches were given.

    Args:
        text: the comparison as it was written; a copy is kept in its folder.

    Raises:
        RequestError: data, documents or the base cannot be read.
        RunError: a training failed.
        InterruptedRun: a signal came; the same command goes on.
    """
    folder = comparison.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "comparison.yaml", text)
    shared = find_shared(comparison, folder)
    for sentence in shared.sentences():
        reporter.note(f"warning: {sentence}")
    pool = _pool(comparison, folder)
    targets, trained = _targets(comparison, folder, reporter, device)
    tasks = {approach.name: task_of(comparison, approach, pool, shared) for approach in comparison.approaches}
    solved: dict[str, Solved] = {}
    for target in dict.fromkeys(targets.values()):
        mine = [approach for approach in comparison.approaches if targets[approach.name] == target]
        measured = _measure(comparison, target, [tasks[approach.name] for approach in mine], folder, reporter, device)
        for approach in mine:
            solved[approach.name] = _solved(comparison, approach, tasks[approach.name], measured, trained.get(approach.name))
        _time(comparison, [(solved[one.name], tasks[one.name]) for one in mine], folder, reporter, device)
    kept = evaluate(comparison.base, comparison.retained, cache=folder / "kept", device=device, progress=reporter.update)
    return [solved[approach.name] for approach in comparison.approaches], kept.results, shared


def task_of(comparison: Comparison, approach: Approach, pool: File, shared: Shared) -> Task:
    """The task as an approach asks it.

    Args:
        pool: the training rows, as a file.
        shared: documents that are left out.
    """
    changes: dict[str, Any] = {"name": approach.name}
    if isinstance(approach, Prompting) and approach.variants is not None:
        variants = approach.variants
        if variants.validation is None:
            variants = variants.model_copy(update={"validation": pool, "limit": variants.limit or CHOOSE_ON})
        changes["variants"] = variants
    if isinstance(approach, FewShot):
        settings: dict[str, Any] = {
            "count": approach.count,
            "choose": approach.choose,
            "separator": approach.separator,
            "seed": approach.seed,
        }
        changes["shots"] = Shots(source=pool, **settings)
    if isinstance(approach, Retrieval | FineTuning):
        changes["retrieve"] = shared.kept.get(approach.name, approach.retrieve)
    return comparison.task.model_copy(update=changes)


def _pool(comparison: Comparison, folder: Path) -> File:
    """The new training rows in one file, from which solved examples and validation rows are taken."""
    from itertools import islice

    from ftcli.data.sources.file import File

    lines = [
        json.dumps(row, ensure_ascii=False, default=str) + "\n"
        for entry in comparison.train
        if entry.role == "new"
        for _, row in islice(entry.source.rows(), entry.limit)
    ]
    path = folder / "rows" / "training-rows.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(lines))
    return File(path=str(path))


def _targets(comparison: Comparison, folder: Path, reporter: Reporter, device: str) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The model of every approach, and of the trained ones what training them took."""
    targets, trained = {}, {}
    for approach in comparison.approaches:
        if not isinstance(approach, FineTuning):
            targets[approach.name] = comparison.base
            continue
        try:
            run, trained[approach.name] = train_approach(comparison, approach, folder, reporter, device)
        except InterruptedRun as error:
            raise InterruptedRun(error.summary, error.problems, hint="the same command goes on") from None
        targets[approach.name] = str(run)
    return targets, trained


def _measure(comparison: Comparison, target: str, tasks: Sequence[Task], folder: Path, reporter: Reporter, device: str) -> Evaluated:
    """All tasks on one model, which is opened once."""
    changed = [_after_change(comparison, task) for task in tasks] if comparison.changed is not None else []
    retained = comparison.retained if target != comparison.base else ()
    return evaluate(target, [*tasks, *changed, *retained], cache=folder / "kept", device=device, progress=reporter.update)


def _after_change(comparison: Comparison, task: Task) -> Task:
    assert comparison.changed is not None
    changes: dict[str, Any] = {"name": f"{task.name}{CHANGED}", "source": comparison.changed.source}
    if task.retrieve is not None and comparison.changed.documents is not None:
        changes["retrieve"] = task.retrieve.model_copy(update={"source": comparison.changed.documents})
    return task.model_copy(update=changes)


def _solved(comparison: Comparison, approach: Approach, task: Task, measured: Evaluated, training: dict[str, Any] | None) -> Solved:
    result = measured.results[approach.name]
    return Solved(
        approach=approach,
        target=measured.target,
        result=result,
        figure=main_figure(task, result),
        precision=measured.precision,
        changed=measured.results.get(f"{approach.name}{CHANGED}"),
        retained={one.name: measured.results[one.name] for one in comparison.retained if one.name in measured.results},
        training=training,
        extra_bytes=0 if training is None else int(training["bytes"]),
    )


def _time(comparison: Comparison, solved: Sequence[tuple[Solved, Task]], folder: Path, reporter: Reporter, device: str) -> None:
    """Tokens and seconds of requests, kept like everything else."""
    subject: Subject | None = None
    for one, task in solved:
        weights = fingerprint(one.target) or one.target
        about = [weights, task.model_dump_json(), task.source.fingerprint(), *task.fingerprints(), comparison.timed_requests, device]
        kept = folder / "timings" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]}.json"
        found = _kept_timing(kept)
        if found is None:
            subject = subject or open_subject(one.target, device)[1]
            found = _timed(task, one.result, subject, comparison.timed_requests, folder, reporter.update)
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, found)
        one.timing, one.prompt_tokens, one.answer_tokens = found, found["prompt_tokens"], found["answer_tokens"]
        one.extra_bytes += found["index_bytes"]


def _kept_timing(path: Path) -> dict[str, Any] | None:
    """What was timed before; None if nothing was, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"prompt_tokens", "answer_tokens", "index_bytes"} <= found.keys() else None


def _timed(
    task: Task, result: TaskResult, subject: Subject, count: int, folder: Path, progress: Callable[[int, int, str], None]
) -> dict[str, Any]:
    from ftcli.models.generate import generate, prompt_ids

    num_rows = max(1, len(result.rows))
    found: dict[str, Any] = {"prompt_tokens": result.tokens / num_rows, "answer_tokens": 0.0, "seconds": None, "slowest_seconds": None}
    found |= {"search_seconds": 0.0, "index_seconds": 0.0, "index_bytes": 0}
    if isinstance(task, Generation):
        prompts = [str(row["prompt"]) for row in result.rows[:COUNTED_PROMPTS]]
        found["prompt_tokens"] = statistics.mean(len(prompt_ids(subject.tokenizer, prompt)) for prompt in prompts)
        found["answer_tokens"] = result.tokens / num_rows
        seconds = []
        # The first is asked twice: what is made ready once is not of a request's time.
        for place, prompt in enumerate([*prompts[:1], *prompts[:count]]):
            began = time.perf_counter()
            generate(subject.model.module, subject.tokenizer, [prompt], max_new_tokens=task.max_new_tokens)
            seconds.append(time.perf_counter() - began)
            progress(place + 1, count + 1, f"{task.name}: requests one by one")
        found |= {"seconds": statistics.median(seconds[1:]), "slowest_seconds": max(seconds[1:])}
    if task.retrieve is not None:
        found |= _timed_search(task, task.retrieve, count, folder)
        found["seconds"] = None if found["seconds"] is None else found["seconds"] + found["search_seconds"]
    return found


def _timed_search(task: Task, retrieve: Retrieve, count: int, folder: Path) -> dict[str, Any]:
    """What indexing costs once, and searching every time."""
    from itertools import islice

    from ftcli.data.leakage import read_text

    began = time.perf_counter()
    retrieve.open(None)
    index_seconds = time.perf_counter() - began
    passages = retrieve.open(folder / "kept" / "passages")
    questions = [read_text(row, where).question for where, row in islice(task.read_rows(), count)]
    began = time.perf_counter()
    for question in questions:
        passages.search(question, retrieve.count)
    return {
        "search_seconds": (time.perf_counter() - began) / len(questions),
        "index_seconds": index_seconds,
        "index_bytes": passages.num_bytes,
        "passages": len(passages.passages),
    }
