"""Whether an answer is JSON at all."""

from __future__ import annotations

from typing import Literal

from ftcli.metrics.json_match import leaves_of
from ftcli.metrics.metric import RowMetric


class JsonValid(RowMetric):
    """1 if the answer is one JSON value and nothing else, whatever the reference says."""

    kind: Literal["json-valid"] = "json-valid"

    def score(self, answer: str, reference: str) -> float:
        """1.0 or 0.0."""
        return float(leaves_of(answer) is not None)
