"""Whether two JSON texts say the same, whatever their layout and key order."""

from __future__ import annotations

import json
from typing import Any, Literal, NoReturn

from ftcli.metrics.metric import RowMetric

Leaf = tuple[tuple[str | int, ...], str, object]


class JsonMatch(RowMetric):
    """Equality of JSON values: key order, spaces and the writing of numbers do not count.

    A text that is not JSON scores 0. `true` and 1 differ; 1 and 1.0 do not.
    """

    kind: Literal["json-match"] = "json-match"
    by_field: bool = False
    """Score the share of fields that agree, instead of all or nothing."""

    def score(self, answer: str, reference: str) -> float:
        """In 0..1: 1.0 for equal values; else 0.0, or with `by_field` the share of the leaves of both that agree."""
        found, expected = leaves_of(answer), leaves_of(reference)
        if found is None or expected is None:
            return 0.0
        return len(found & expected) / len(found | expected) if self.by_field else float(found == expected)


def leaves_of(text: str) -> set[Leaf] | None:
    """The leaves of a JSON text; None if it is not JSON, or nested past Python's depth."""
    try:
        return _leaves(json.loads(text, parse_constant=_refuse), ())
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> NoReturn:
    """NaN and Infinity are Python's additions, not JSON."""
    raise ValueError(name)


def _leaves(value: Any, path: tuple[str | int, ...]) -> set[Leaf]:
    """Every leaf as (path, type, value); an empty object or array is a leaf, too."""
    if isinstance(value, dict) and value:
        return set().union(*(_leaves(item, (*path, key)) for key, item in value.items()))
    if isinstance(value, list) and value:
        return set().union(*(_leaves(item, (*path, index)) for index, item in enumerate(value)))
    if isinstance(value, dict | list):
        return {(path, type(value).__name__, None)}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {(path, "number" if is_number else type(value).__name__, value)}
