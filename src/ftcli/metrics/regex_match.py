"""Whether the part of an answer that a pattern finds is the reference."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator

from ftcli.metrics.metric import RowMetric
from ftcli.metrics.normalise import SQUAD, Normaliser, normalised


def _checked(pattern: str) -> str:
    """`pattern`, if it compiles.

    Raises:
        ValueError: it does not.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"found `{pattern}`, allowed: a regular expression ({error})") from error
    return pattern


class RegexMatch(RowMetric):
    """1 if what the pattern finds in the answer is what it finds in the reference, else 0.

    Taken is the last match that is not empty, and of it the first group where the pattern has groups; of a reference in which nothing
    is found, all. An answer in which nothing is found scores 0.
    """

    kind: Literal["regex-match"] = "regex-match"
    pattern: Annotated[str, AfterValidator(_checked)] = r"(?i)answer(?:\s+is)?\s*:?\s*(.+)"
    """Regular expression; the default finds what stands behind "answer is" or "Answer:", to the end of its line."""
    normalise: tuple[Normaliser, ...] = SQUAD
    """What does not count: `case`, `punctuation`, `articles` (English), `spaces`."""

    def score(self, answer: str, reference: str) -> float:
        """1.0 or 0.0."""
        found, expected = self._extracted(answer), self._extracted(reference)
        if found is None:
            return 0.0
        return float(normalised(found, self.normalise) == normalised(reference if expected is None else expected, self.normalise))

    def _extracted(self, text: str) -> str | None:
        """What the pattern finds last; None if nothing."""
        last = None
        for match in re.finditer(self.pattern, text):
            last = match if match[0] else last
        if last is None:
            return None
        return next((group for group in last.groups() if group is not None), last[0]) if last.groups() else last[0]
