"""Whether the number an answer ends on is the reference's."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from pydantic import Field

from ftcli.metrics.metric import RowMetric

_MINUS = "\N{MINUS SIGN}"
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?"  # a sign, unless it stands after a word or a number: 10-5 are 10 and 5
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"  # whole part, with commas for thousands; .5 has none
    r"(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?"
)


class NumberMatch(RowMetric):
    """1 if the last number of the answer is the last number of the reference, else 0.

    Thousands may be written with commas: 1,200 is 1200. A hyphen and the minus sign of typesetting (U+2212) are minus, other dashes
    are not. What stands before the marker, if one is set, does not count.
    """

    kind: Literal["number-match"] = "number-match"
    marker: str | None = Field(default=None, min_length=1)
    """Take the first number after the last one of these, such as `####`; without it, in a text that has none, the last number."""
    tolerance: float = Field(default=0.0, ge=0)
    """How far apart two numbers may be and still match; a larger value is more lenient."""

    def score(self, answer: str, reference: str) -> float:
        """1.0 or 0.0; 0.0 where either text has no number."""
        found, expected = self._number(answer), self._number(reference)
        if found is None or expected is None:
            return 0.0
        return float(abs(found - expected) <= Decimal(str(self.tolerance)))

    def _number(self, text: str) -> Decimal | None:
        text = text.replace(_MINUS, "-")
        if self.marker is not None and self.marker in text:
            numbers = _NUMBER.findall(text.rpartition(self.marker)[2])[:1]
        else:
            numbers = _NUMBER.findall(text)[-1:]
        return Decimal(numbers[0].replace(",", "")) if numbers else None
