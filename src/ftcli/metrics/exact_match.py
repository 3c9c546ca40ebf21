"""Whether the answer is the reference, character by character."""

from __future__ import annotations

from typing import Literal

from ftcli.metrics.metric import RowMetric
from ftcli.metrics.normalise import Normaliser, normalised


class ExactMatch(RowMetric):
    """1 if the answer is the reference, else 0."""

    kind: Literal["exact-match"] = "exact-match"
    strip: bool = True
    """Whitespace around both does not count, nor what `normalise` leaves there."""
    ignore_case: bool = False
    """Upper and lower case count as the same."""
    normalise: tuple[Normaliser, ...] = ()
    """What else does not count: `case`, `punctuation`, `articles` (English), `spaces`."""

    def score(self, answer: str, reference: str) -> float:
        """1.0 or 0.0."""
        return float(self._normal(answer) == self._normal(reference))

    def _normal(self, text: str) -> str:
        text = normalised(text, self.normalise)
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text
