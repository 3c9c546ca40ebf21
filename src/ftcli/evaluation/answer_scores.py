"""Answers scored one by one as they come, and the figures of all of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ftcli.errors import UsageError
from ftcli.evaluation.rows import Rows
from ftcli.evaluation.statistics import Interval, bootstrap_counts
from ftcli.evaluation.tasks.task import Figure, mean_figure, share_figure
from ftcli.metrics.metric import CorpusMetric

if TYPE_CHECKING:
    from ftcli.evaluation.user_metrics import UserMetric
    from ftcli.metrics import Metric

# Times that a user's function of all rows is called on resampled rows: it may be slow.
USER_RESAMPLES = 200


class AnswerScores:
    """Numbers in memory, texts on the disk.

    A metric of a whole set (BLEU, chrF) is never a mean over rows: its counts are added up, and its interval comes from resampled
    sums. A user's function of all rows is given them all at once, and has no values to compare two models by.
    """

    def __init__(self, metrics: Sequence[Metric], user_metrics: Sequence[UserMetric] = ()) -> None:
        self.rows = Rows()
        self._row_metrics = [metric for metric in metrics if not isinstance(metric, CorpusMetric)]
        self._corpus_metrics = [metric for metric in metrics if isinstance(metric, CorpusMetric)]
        self._user_metrics = tuple(user_metrics)
        self._order = [figure_name(metric) for metric in metrics]
        if doubled := {*self._order, "ended"} & {metric.name for metric in user_metrics}:
            name = min(doubled)
            line = next(metric.line for metric in user_metrics if metric.name == name)
            raise UsageError(f"--metrics line {line}: `{name}` is the name of another figure", hint="give the function another name")
        names = [*(figure_name(metric) for metric in self._row_metrics), *(m.name for m in user_metrics if not m.of_all), "ended"]
        self._values = {name: array("d") for name in names}
        self._counts = {figure_name(metric): array("d") for metric in self._corpus_metrics}
        self._user_rows = Rows()

    def add(self, where: str, row: dict[str, Any], prompt: str, answer: str | None, references: list[str], ended: bool) -> None:
        """Score one answer; None is an answer that could not be asked for: it counts as wrong, and as an empty text."""
        text = "" if answer is None else answer
        scores = {figure_name(metric): 0.0 if answer is None else metric.best(text, references) for metric in self._row_metrics}
        scores |= {metric.name: metric.of_row(text, references, row, where) for metric in self._user_metrics if not metric.of_all}
        scores["ended"] = float(ended)
        for metric in self._corpus_metrics:
            self._counts[figure_name(metric)].extend(metric.counts(text, references))
        for name, score in scores.items():
            self._values[name].append(score)
        reference = references[0] if len(references) == 1 else references
        self.rows.append({"where": where, "prompt": prompt, "reference": reference, "answer": text, **scores})
        if any(metric.of_all for metric in self._user_metrics):
            self._user_rows.append({"answer": text, "reference": reference, "row": row})

    def figures(self) -> dict[str, Figure]:
        """The metrics in the order of the task, then the user's, then the share of answers that the model ended."""
        import numpy as np

        found = {name: mean_figure(np.array(values)) for name, values in self._values.items() if name != "ended"}
        for metric in self._corpus_metrics:
            counts = np.array(self._counts[figure_name(metric)]).reshape(len(self.rows), -1)
            found[figure_name(metric)] = Figure(*bootstrap_counts(counts, metric.of_counts))
        for user in self._user_metrics:
            if user.of_all:
                found[user.name] = self._of_all(user)
        ordered = [*self._order, *(name for name in found if name not in self._order)]
        return {**{name: found[name] for name in ordered}, "ended": share_figure(np.array(self._values["ended"]))}

    def _of_all(self, metric: UserMetric) -> Figure:
        """A user's figure of all rows, with the middle 95 % of what it is on resampled rows."""
        import numpy as np

        kept = list(self._user_rows)

        def on(places: Sequence[int]) -> float:
            chosen = [kept[place] for place in places]
            return metric.of_rows([one["answer"] for one in chosen], [one["reference"] for one in chosen], [one["row"] for one in chosen])

        generator, count = np.random.default_rng(0), len(kept)
        value = on(range(count))
        drawn = [on(generator.integers(0, count, count).tolist()) for _ in range(USER_RESAMPLES)]
        low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
        return Figure(Interval(value, low, high), None)


def figure_name(metric: Metric) -> str:
    return metric.key.replace("-", "_")


class Told:
    """The progress that `generate` tells, as a task tells it."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress = progress

    def update(self, done: int, total: int, what: str) -> None:
        self._progress(done, total)
