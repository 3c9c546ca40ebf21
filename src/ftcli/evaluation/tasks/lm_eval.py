"""Tasks of lm-evaluation-harness, on our model in memory."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftcli.errors import MissingExtraError, Problem, RequestError
from ftcli.evaluation.rows import Rows
from ftcli.evaluation.statistics import Interval
from ftcli.evaluation.tasks.task import Figure, Subject, TaskResult, TaskSettings, mean_figure
from ftcli.spec import LocalPath, Spec

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

_HIDDEN = frozenset(["doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"])


class TaskFolder(Spec):
    """Where the harness finds its tasks: the rows are its own."""

    kind: Literal["lm-eval"] = "lm-eval"
    path: LocalPath | None = None
    """Folder with task files (YAML); without one, the tasks that the harness brings, whose data it downloads."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return iter(())

    def label(self) -> str:
        return "lm-eval" if self.path is None else Path(self.path).name

    def fingerprint(self) -> str:
        """Hash of the files in the folder, and of the harness's version."""
        from importlib import metadata

        digest = hashlib.sha256()
        try:
            digest.update(metadata.version("lm_eval").encode())
        except metadata.PackageNotFoundError as error:
            raise MissingExtraError("a task of the kind `lm-eval`", "lm-eval") from error
        for path in sorted(Path(self.path).rglob("*")) if self.path is not None else ():
            if path.is_file():
                digest.update(path.read_bytes())
        return digest.hexdigest()


class LmEval(TaskSettings):
    """One task of lm-evaluation-harness: its prompts, its metrics, its filters; our forward pass, intervals and comparisons.

    Figures are called METRIC or METRIC_FILTER. Needs the extra `lm-eval`.
    """

    kind: Literal["lm-eval"]
    source: TaskFolder = TaskFolder()  # type: ignore[assignment]  # narrower than every task's source
    """Where task files are."""
    task: str
    """The harness's name of the task."""
    num_fewshot: int | None = None
    """Solved examples; the default is the task's own number."""

    main_figure: ClassVar[str] = ""

    def check(self, subject: Subject) -> None:
        """Nothing: the rows are the harness's."""

    def measure(self, subject: Subject) -> TaskResult:
        """Every metric of the task.

        Raises:
            MissingExtraError: lm_eval is not installed.
            RequestError: it has no such task.
        """
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingExtraError("a task of the kind `lm-eval`", "lm-eval") from error
        from ftcli.evaluation.lm_eval_model import FtcliLM

        model = FtcliLM(subject)
        manager = TaskManager(include_path=self.source.path, include_defaults=self.source.path is None)
        if self.task not in manager.all_tasks:
            shown = ", ".join(sorted(manager.all_tasks)[:8])
            raise RequestError(f"task `{self.name}`", [Problem("task", f"lm-eval has no task `{self.task}` there", f"tasks: {shown}")])
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=[self.task],
            task_manager=manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        if self.task not in found["results"] or self.task not in found["samples"]:
            raise RequestError(f"task `{self.name}`", [Problem("task", f"`{self.task}` is a group of tasks", "name one of them")])
        return _result(found["results"][self.task], found["samples"][self.task], found["higher_is_better"].get(self.task, {}), model)

    def prompts(self, rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Tokenizer) -> list[str]:
        return ["" for _ in rows]


def _result(results: dict[str, Any], samples: Sequence[dict[str, Any]], better: dict[str, bool], model: Any) -> TaskResult:
    """The harness's numbers as figures: with an interval where they are the mean of rows."""
    import numpy as np

    filters = list(dict.fromkeys(str(sample.get("filter", "none")) for sample in samples))
    by_filter = {
        name: sorted((one for one in samples if str(one.get("filter", "none")) == name), key=lambda one: int(one["doc_id"]))
        for name in filters
    }
    figures: dict[str, Figure] = {}
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        values = array("d")
        for sample in by_filter.get(filtered, ()):
            if isinstance(sample.get(metric), bool | int | float):
                values.append(float(sample[metric]))
        is_mean = len(values) == len(by_filter.get(filtered, ())) > 0 and abs(float(np.mean(values)) - value) < 1e-9
        name = metric if filtered == "none" else f"{metric}_{filtered.replace('-', '_')}"
        higher = better.get(metric) is not False
        figures[name] = (
            mean_figure(np.array(values), higher_is_better=higher)
            if is_mean
            else Figure(Interval(float(value), float("-inf"), float("inf")), None, higher)
        )
    rows = Rows(
        {
            "where": f"{sample['doc_id']}",
            "prompt": str(next(iter(sample["arguments"]), [""])[0]) if sample.get("arguments") else "",
            "reference": str(sample.get("target", "")),
            "answer": str(sample.get("filtered_resps", "")),
            **{key: value for key, value in sample.items() if key not in _HIDDEN and isinstance(value, bool | int | float)},
        }
        for sample in by_filter[filters[0]]
    )
    return TaskResult(figures, rows, [], model.num_tokens)
