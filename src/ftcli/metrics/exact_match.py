"""Whether the answer is the reference, character by character."""

from __future__ import annotations

from typing import Literal

from ftcli.spec import Spec


class ExactMatch(Spec):
    """1 if the answer is the reference, else 0."""

    kind: Literal["exact-match"] = "exact-match"
    strip: bool = True
    """Whitespace around both does not count."""
    ignore_case: bool = False
    """Upper and lower case count as the same."""

    def score(self, answer: str, reference: str) -> float:
        """1.0 or 0.0."""
        return float(self._normal(answer) == self._normal(reference))

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text
