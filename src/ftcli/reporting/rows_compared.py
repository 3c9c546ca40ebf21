"""Scores of single rows that runs have left, with intervals, and compared: before and after training, and between runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.evaluation.statistics import Comparison, Interval

SCORES = "scores.jsonl"
_ERRORS = 1.96
"""Standard errors on each side of a loss that hold 95 %."""
Key = tuple[str, str]
"""(source, metric)."""


@dataclass(frozen=True, slots=True)
class Paired:
    """One metric of one source, of two models on the same rows; a positive difference is the second's gain."""

    source: str
    metric: str
    comparison: Comparison
    adjusted_p: float
    """Holm's, over everything compared with it."""

    def cells(self) -> list[str]:
        """Source, metric, difference with interval, p, rows gained and lost, what would have been seen."""
        found = self.comparison
        word = "no difference shown" if self.adjusted_p >= 0.05 else ("better" if found.difference.value > 0 else "worse")
        interval = f"{100 * found.difference.value:+.1f} ({100 * found.difference.low:+.1f} to {100 * found.difference.high:+.1f})"
        least = f"{100 * found.minimum_detectable:.1f}" if found.is_detectable_known else "not known"
        rows = f"{found.num_only_a} / {found.num_only_b}"
        return [self.source, self.metric.replace("_", " "), word, interval, f"{self.adjusted_p:.2g}", rows, least, str(found.num_rows)]


PAIRED_HEADINGS = ["source", "metric", "verdict", "points (95 %)", "p, Holm", "gained / lost rows", "detectable", "rows"]


def read_scores(run_folder: Path) -> dict[int, dict[Key, dict[str, float]]]:
    """Step -> (source, metric) -> row -> score; what cannot be read is left out."""
    found: dict[int, dict[Key, dict[str, float]]] = {}
    try:
        lines = (run_folder / SCORES).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    for line in lines:
        record = _parsed(line)
        scores = record.get("scores")
        if not isinstance(record.get("step"), int) or not isinstance(scores, Mapping):
            continue
        for metric, score in scores.items():
            if isinstance(score, int | float):
                rows = found.setdefault(record["step"], {}).setdefault((str(record.get("source")), str(metric)), {})
                rows[str(record.get("where"))] = float(score)
    return found


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line) if line.strip() else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def before_and_after(scores: Mapping[int, Mapping[Key, Mapping[str, float]]]) -> tuple[Mapping[Key, Mapping[str, float]], ...]:
    """The scores before the first step, and those after the last one that has any; either may be empty."""
    last = max(scores, default=0)
    return scores.get(0, {}), scores[last] if last > 0 else {}


def interval_of(rows: Mapping[str, float]) -> Interval:
    """The mean with its 95 % interval: Wilson's for right or wrong, else the bootstrap's over rows."""
    import numpy as np

    from ftcli.evaluation.statistics import bootstrap_mean, wilson

    values = np.array(list(rows.values()))
    return wilson(float(values.sum()), len(values)) if np.isin(values, (0.0, 1.0)).all() else bootstrap_mean(values)


def loss_interval(loss: float, error: float) -> str:
    """The 95 % interval of a loss from its standard error."""
    return f"{loss - _ERRORS * error:.4f} to {loss + _ERRORS * error:.4f}"


def paired(first: Mapping[Key, Mapping[str, float]], second: Mapping[Key, Mapping[str, float]]) -> list[Paired]:
    """The second against the first on the rows that both have, metric by metric."""
    from ftcli.evaluation.statistics import compare, holm

    found = []
    for key in [key for key in second if key in first]:
        rows = [row for row in second[key] if row in first[key]]
        if rows:
            found.append((key, compare(_values(second[key], rows), _values(first[key], rows))))
    adjusted = holm([comparison.p_value for _, comparison in found])
    return [Paired(*key, comparison, p_value) for (key, comparison), p_value in zip(found, adjusted, strict=True)]


def _values(scores: Mapping[str, float], rows: Sequence[str]) -> NDArray[np.float64]:
    import numpy as np

    return np.array([scores[row] for row in rows], dtype=np.float64)
