"""What every kind of task is: settings, and how a model's figures on its rows come about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftcli.data.sources import Source
from ftcli.evaluation.rows import ROWS_AT_ONCE, in_parts
from ftcli.evaluation.statistics import Comparison, Interval, bootstrap_mean, bootstrap_ratio, compare, wilson
from ftcli.evaluation.tasks.retrieve import Retrieve
from ftcli.evaluation.tasks.variants import Variants
from ftcli.spec import ExpandedName, Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.evaluation.tasks.shots import Shots
    from ftcli.evaluation.user_metrics import UserMetric
    from ftcli.layout.model import TreeModel
    from ftcli.models.tokenizer import Tokenizer

    Values = NDArray[np.float64]


Progress = Callable[[int, int], None]
"""Is told (done, all)."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number about a model on a task."""

    interval: Interval
    values: Values | None
    """(n,) one number a row, where the figure is their mean; comparisons are made on them."""
    higher_is_better: bool = True
    weights: Values | None = None
    """(n,) how much each row counts in the mean; the default is the same for all."""

    def to_json(self) -> dict[str, Any]:
        return {**self.interval.to_json(), "higher_is_better": self.higher_is_better}

    def of_rows(self, chosen: NDArray[np.bool_]) -> Figure | None:
        """The same figure of some rows alone; None where it is no mean over rows, or none of them counts.

        Args:
            chosen: ``(n,)``
        """
        if self.values is None or len(self.values) != len(chosen) or not chosen.any():
            return None
        values = self.values[chosen]
        if self.weights is None:
            return mean_figure(values, higher_is_better=self.higher_is_better)
        weights = self.weights[chosen]
        if weights.sum() == 0:
            return None
        return Figure(bootstrap_ratio(values * weights, weights), values, self.higher_is_better, weights)

    def against(self, other: Figure, chosen: NDArray[np.bool_] | None = None) -> Comparison | None:
        """This figure less `other`, the same one of another model on the same rows, weighted as the two are; None where it is no mean
        over rows, the rows are others, or none of them counts.

        Args:
            chosen: ``(n,)`` of the rows that count; the default is all.
        """
        if self.values is None or other.values is None or not len(self.values) == len(other.values) > 0:
            return None
        if (self.weights is None) != (other.weights is None):
            return None
        rows = slice(None) if chosen is None else chosen
        weights = [None if one.weights is None else one.weights[rows] for one in (self, other)]
        if len(self.values[rows]) == 0 or any(one is not None and one.sum() <= 0 for one in weights):
            return None
        return compare(self.values[rows], other.values[rows], a_weights=weights[0], b_weights=weights[1])


@dataclass(slots=True)
class TaskResult:
    """What a model measured on a task."""

    figures: dict[str, Figure]
    rows: Sequence[dict[str, Any]]
    """One for each row, in their order: `where`, what was asked, what came, and its value of every figure."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know: rows cut, rows left out, and why."""
    tokens: int = 0
    """Tokens that went through the model."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else was found, ready for JSON: `variants` tried, figures of `groups` of rows, and of the `clean` rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The model under evaluation."""

    model: TreeModel
    tokenizer: Tokenizer
    batch_tokens: int
    progress: Callable[[int, int], None]
    allow_code: bool = False
    """Programs that the model writes may be run."""
    user_metrics: tuple[UserMetric, ...] = ()
    """Of the file that the command line names; every generation task is scored by them, too."""


class LeakageCheck(Spec):
    """Training data that rows of the task may stand in; what stands there is left out of a second figure."""

    train: tuple[Source, ...] = ()
    """Training data; the default is that of the run which is evaluated, and nothing for other models."""
    min_near: float = Field(default=0.6, ge=0.3, le=1)
    """Share of common character 4-grams from which a row counts as standing there, too; a larger value finds less."""


class TaskSettings(Spec, ABC):
    """Rows, and what is measured on them."""

    name: ExpandedName
    """What reports and gates call the task."""
    source: Source
    """Where the rows come from."""
    limit: int | None = Field(default=None, ge=1)
    """Take only the first so many rows."""
    retained: bool = False
    """The task is something the model could do before; its change is reported as forgetting."""
    stage: int | None = Field(default=None, ge=1)
    """Which of the models named for `--stages`, counted from 1, was trained on this task; without it, all were trained after it."""
    variants: Variants | None = None
    """Ways to ask, of which the best on validation rows is measured on the others."""
    retrieve: Retrieve | None = None
    """Passages of documents that are put in front of every question."""
    group_by: str | None = None
    """Column by whose values the main figure is also told apart: which skills moved."""
    leakage: LeakageCheck | None = None
    """Also measure the rows that do not stand in training data."""

    main_figure: ClassVar[str]
    """The figure by which models are compared and tables sorted."""

    @abstractmethod
    def measure(self, subject: Subject) -> TaskResult:
        """Every figure of the task.

        Raises:
            DataError: a row cannot be read; the error names file, line and column.
        """

    def check(self, subject: Subject) -> None:
        """Read every row as `measure` will, and compute nothing: an error in the last task is not found after hours of work.

        Raises:
            DataError: a row cannot be read; the error names file, line and column.
        """
        for part in in_parts(self.read_rows(), ROWS_AT_ONCE):
            if self.variants is None and self.retrieve is None:  # these write rows of their own
                self.check_rows(part, subject)

    def check_rows(self, rows: Sequence[tuple[str, dict[str, Any]]], subject: Subject) -> None:
        """Read some rows."""

    def prompts(self, rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Tokenizer) -> list[str]:
        """What the model reads of each row before it answers, without solved examples; as good as can be told of any task."""
        from ftcli.data.leakage import read_text

        return ["\n".join(part for part in (text.question, text.answer) if part) for text in (read_text(row, where) for where, row in rows)]

    def bare_prompts(self, tokenizer: Tokenizer) -> list[str]:
        """The prompts of all rows without the passages that were put in front of their questions; empty where there are none."""
        bare = getattr(self.source, "bare", ())
        return self.prompts(bare, tokenizer) if bare else []

    def fingerprints(self) -> list[str]:
        """Hashes of all data beside the task's own rows that decide its figures."""
        shots: Shots | None = getattr(self, "shots", None)
        sources = [
            shots.source if shots is not None else None,
            self.variants.validation if self.variants is not None else None,
            *(self.leakage.train if self.leakage is not None else ()),
        ]
        retrieved = [self.retrieve.fingerprint()] if self.retrieve is not None else []
        return [*(source.fingerprint() for source in sources if source is not None), *retrieved]

    def read_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, row) of the rows that count.

        Raises:
            DataError: there are none.
        """
        from itertools import islice

        from ftcli.errors import DataError

        empty = True
        for where, row in islice(self.source.rows(), self.limit):
            empty = False
            yield where, row
        if empty:
            raise DataError(f"task `{self.name}`: `{self.source.label()}` has no rows")

    def parts(self, subject: Subject, size: int | None = ROWS_AT_ONCE) -> Iterator[tuple[list[tuple[str, dict[str, Any]]], Progress]]:
        """The rows in lists that fit in memory, each with what its part of the work is told to.

        All rows are read once before, so that one that cannot be read is not found after hours of work.

        Args:
            size: rows of a part; None makes one part of all.
        """
        total, before = sum(1 for _ in self.read_rows()), 0
        for part in in_parts(self.read_rows(), size):
            yield part, _told(subject.progress, before, len(part), total)
            before += len(part)


def _told(progress: Progress, before: int, size: int, total: int) -> Progress:
    return lambda done, of: progress(before + size * done // max(1, of), total)


def share_figure(values: Values) -> Figure:
    """A figure of right-or-wrong values, with Wilson's interval."""
    return Figure(wilson(float(values.sum()), len(values)), values)


def mean_figure(values: Values, *, higher_is_better: bool = True) -> Figure:
    """A figure of scores: Wilson's interval where all are 0 or 1, else the bootstrap's."""
    import numpy as np

    if np.isin(values, (0.0, 1.0)).all():
        return Figure(wilson(float(values.sum()), len(values)), values, higher_is_better)
    return Figure(bootstrap_mean(values), values, higher_is_better)
