"""chrF of a whole set of answers, by sacrebleu's counts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftcli.metrics.metric import CorpusMetric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]


class Chrf(CorpusMetric):
    """F-score of runs of letters over the whole set, recall counting twice, in 0..1 (a hundredth of sacrebleu's number).

    Of several references the one with the best score of the row counts. Needs the extra `metrics`.
    Source: Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation"; 2017 for chrF++.
    """

    kind: Literal["chrf"] = "chrf"
    word_order: int = Field(default=0, ge=0, le=4)
    """Also runs of so many words; 2 is chrF++."""
    lowercase: bool = False
    """Upper and lower case count as the same."""

    def counts(self, answer: str, references: Sequence[str]) -> list[float]:
        """(3 (6 + word_order)) n-grams of the answer, of the reference, of both, for each length."""
        found = _scorer(self.word_order, self.lowercase)._extract_corpus_statistics([answer], [[text] for text in references])
        return [float(count) for count in found[0]]

    def of_counts(self, sums: Numbers) -> Numbers:
        """chrF of sums of counts."""
        import numpy as np

        said, there, both = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
        counted = (said > 0) & (there > 0)
        num_counted = np.maximum(counted.sum(axis=-1), 1)
        precision = np.where(counted, both / np.maximum(said, 1), 0.0).sum(axis=-1) / num_counted
        recall = np.where(counted, both / np.maximum(there, 1), 0.0).sum(axis=-1) / num_counted
        return np.where(precision + recall > 0, 5 * precision * recall / np.maximum(4 * precision + recall, 1e-300), 0.0)


@cache
def _scorer(word_order: int, lowercase: bool) -> Any:
    """
    Raises:
        MissingExtraError: `sacrebleu` is not installed.
    """
    from ftcli.errors import MissingExtraError

    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise MissingExtraError("the metric `chrf`", "metrics") from error
    return CHRF(word_order=word_order, lowercase=lowercase)
