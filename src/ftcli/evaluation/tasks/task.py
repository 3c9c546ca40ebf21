"""What every kind of task is: settings, and how a model's figures on its rows come about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftcli.data.sources import Source
from ftcli.evaluation.statistics import Interval, bootstrap_mean, wilson
from ftcli.spec import ExpandedName, Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.layout.model import TreeModel
    from ftcli.models.tokenizer import Tokenizer

    Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number about a model on a task."""

    interval: Interval
    values: Values | None
    """(n,) one number a row, where the figure is their mean; comparisons are made on them."""
    higher_is_better: bool = True

    def to_json(self) -> dict[str, Any]:
        return {**self.interval.to_json(), "higher_is_better": self.higher_is_better}


@dataclass(slots=True)
class TaskResult:
    """What a model measured on a task."""

    figures: dict[str, Figure]
    rows: list[dict[str, Any]]
    """One for each row, in their order: `where`, what was asked, what came, and its value of every figure."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know: rows cut, rows left out, and why."""
    tokens: int = 0
    """Tokens that went through the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The model under evaluation."""

    model: TreeModel
    tokenizer: Tokenizer
    batch_tokens: int
    progress: Callable[[int, int], None]


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

    main_figure: ClassVar[str]
    """The figure by which models are compared and tables sorted."""

    @abstractmethod
    def measure(self, subject: Subject) -> TaskResult:
        """Every figure of the task.

        Raises:
            DataError: a row cannot be read; the error names file, line and column.
        """

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


def share_figure(values: Values) -> Figure:
    """A figure of right-or-wrong values, with Wilson's interval."""
    return Figure(wilson(float(values.sum()), len(values)), values)


def mean_figure(values: Values, *, higher_is_better: bool = True) -> Figure:
    """A figure of scores: Wilson's interval where all are 0 or 1, else the bootstrap's."""
    import numpy as np

    if np.isin(values, (0.0, 1.0)).all():
        return Figure(wilson(float(values.sum()), len(values)), values, higher_is_better)
    return Figure(bootstrap_mean(values), values, higher_is_better)
