"""Overlap of the answer with the reference in words, pairs of words, or common subsequences."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from ftcli.metrics.metric import RowMetric

Variant = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]


class Rouge(RowMetric):
    """F1 of ROUGE as the package `rouge-score` computes it, the mean over the rows.

    Words are runs of a to z and digits, in lower case: texts in other scripts score 0. Needs the extra `metrics`.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """

    kind: Literal["rouge"] = "rouge"
    variant: Variant = "rougeL"
    """`rouge1` and `rouge2` compare words and pairs, `rougeL` the longest common subsequence, `rougeLsum` that of every line."""
    stemmer: bool = False
    """Endings of English words do not count."""

    @property
    def key(self) -> str:
        return {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l", "rougeLsum": "rouge-lsum"}[self.variant]

    def score(self, answer: str, reference: str) -> float:
        """In 0..1."""
        found = _scorer(self.variant, self.stemmer).score(reference, answer)[self.variant]
        return float(found.fmeasure)


@cache
def _scorer(variant: str, stemmer: bool) -> Any:
    """
    Raises:
        MissingExtraError: `rouge-score` is not installed.
    """
    from ftcli.errors import MissingExtraError

    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("the metric `rouge`", "metrics") from error
    return RougeScorer([variant], use_stemmer=stemmer)
