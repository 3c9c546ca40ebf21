"""BLEU of a whole set of answers, by sacrebleu's tokenizers and counts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from ftcli.metrics.metric import CorpusMetric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

MAX_ORDER = 4


class Bleu(CorpusMetric):
    """BLEU over the whole set: n-grams of all rows are added up and scored once, in 0..1 (a hundredth of sacrebleu's number).

    Of several references a word may be in any, and the length is compared with the nearest one. A row alone is no set: the
    score of one short answer says little. Needs the extra `metrics`.
    Source: Papineni et al. 2002; Post 2018, arXiv:1804.08771 (sacrebleu, with its exponential smoothing).
    """

    kind: Literal["bleu"] = "bleu"
    tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """How sacrebleu finds words: `13a` for most languages, `intl` by Unicode classes, `zh` for Chinese, `char` letter by letter."""
    lowercase: bool = False
    """Upper and lower case count as the same."""

    def counts(self, answer: str, references: Sequence[str]) -> list[float]:
        """(10) length, nearest reference length, matching n-grams of 1 to 4 words, all n-grams of 1 to 4 words."""
        found = _scorer(self.tokenize, self.lowercase)._extract_corpus_statistics([answer], [[text] for text in references])
        return [float(count) for count in found[0]]

    def of_counts(self, sums: Numbers) -> Numbers:
        """BLEU of sums of counts."""
        import numpy as np

        length, target = sums[..., 0], sums[..., 1]
        hits, total = sums[..., 2 : 2 + MAX_ORDER], sums[..., 2 + MAX_ORDER :]
        with np.errstate(divide="ignore", invalid="ignore"):
            brevity = np.where(length < target, np.exp(1 - target / length), 1.0)
            # The k-th order without a match counts as 1 / 2^k matches: Chen and Cherry 2014, method 3.
            smooth = np.where(hits == 0, 2.0 ** -np.cumsum(hits == 0, axis=-1), hits)
            score = brevity * np.exp(np.log(smooth / total).mean(axis=-1))
        is_empty = (hits.sum(axis=-1) == 0) | (total == 0).any(axis=-1)
        return np.where(is_empty, 0.0, np.minimum(score, 1.0))


@cache
def _scorer(tokenize: str, lowercase: bool) -> Any:
    """
    Raises:
        MissingExtraError: `sacrebleu` is not installed.
    """
    from ftcli.errors import MissingExtraError

    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingExtraError("the metric `bleu`", "metrics") from error
    return BLEU(tokenize=tokenize, lowercase=lowercase)
