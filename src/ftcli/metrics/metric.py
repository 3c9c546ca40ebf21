"""What every metric is: a score of an answer against its references, and of a whole set of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from ftcli.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

M = TypeVar("M", bound="RowMetric")


class RowMetric(Spec):
    """A metric of one answer; the score of a set is the mean of its rows. Every score is in 0..1, and higher is better."""

    @property
    def key(self) -> str:
        """What results call it; two metrics of one list may not have the same."""
        return str(getattr(self, "kind"))  # noqa: B009 - every kind declares it with a type of its own

    @abstractmethod
    def score(self, answer: str, reference: str) -> float:
        """In 0..1."""

    def best(self, answer: str, references: Sequence[str]) -> float:
        """The score against the reference that fits best: where a row has several, any of them is right."""
        return max(self.score(answer, reference) for reference in references)

    def over(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The score of a set of rows."""
        return sum(map(self.best, answers, references)) / len(answers)


class CorpusMetric(RowMetric):
    """A metric of a whole set: counts are added up over the rows and scored once. It is not the mean of the rows' scores."""

    @abstractmethod
    def counts(self, answer: str, references: Sequence[str]) -> list[float]:
        """(k) numbers of one row, to be added up."""

    @abstractmethod
    def of_counts(self, sums: Numbers) -> Numbers:
        """Scores in 0..1 of sums of counts.

        Args:
            sums: ``(..., k)``.

        Returns:
            ``(...)``.
        """

    def score(self, answer: str, reference: str) -> float:
        """Of the one row as if it were the whole set."""
        return self.over([answer], [[reference]])

    def best(self, answer: str, references: Sequence[str]) -> float:
        """Of the one row; how several references count is the metric's own rule."""
        return self.over([answer], [references])

    def over(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """The score of a set of rows."""
        import numpy as np

        sums = np.array([self.counts(*row) for row in zip(answers, references, strict=True)], dtype=np.float64).sum(axis=0)
        return float(self.of_counts(sums))


def without_doubles(metrics: tuple[M, ...]) -> tuple[M, ...]:
    """The metrics, if results can tell them apart.

    Raises:
        ValueError: two have the same key.
    """
    keys = [metric.key for metric in metrics]
    doubled = next((key for key in keys if keys.count(key) > 1), None)
    if doubled is not None:
        raise ValueError(f"found `{doubled}` twice, allowed: each metric once")
    return metrics
