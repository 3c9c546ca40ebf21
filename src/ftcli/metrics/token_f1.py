"""How many words of the answer and of the reference are the same."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from ftcli.metrics.metric import RowMetric
from ftcli.metrics.normalise import SQUAD, Normaliser, normalised


class TokenF1(RowMetric):
    """Harmonic mean of precision and recall over words, each as often as it occurs.

    Two texts without words score 1, one without words 0. Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1; two empty
    texts as in SQuAD 2.0.
    """

    kind: Literal["token-f1"] = "token-f1"
    normalise: tuple[Normaliser, ...] = SQUAD
    """What does not count: `case`, `punctuation`, `articles` (English), `spaces`."""

    def score(self, answer: str, reference: str) -> float:
        """In 0..1."""
        found, expected = (normalised(text, self.normalise).split() for text in (answer, reference))
        if not found or not expected:
            return float(found == expected)
        common = sum((Counter(found) & Counter(expected)).values())
        return 2 * common / (len(found) + len(expected))
