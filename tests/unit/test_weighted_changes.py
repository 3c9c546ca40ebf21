"""What is said of a change is said of the printed figures: of weighted ones the difference is weighted, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ftcli.evaluation.evaluate import Evaluated, changes
from ftcli.evaluation.tasks.language_modelling import LanguageModelling
from ftcli.evaluation.tasks.task import Figure, TaskResult

SIZES = np.array([4000.0, *([20.0] * 11)])
DETAILS: dict[str, Any] = {
    "groups": {"rows": ["long", *(["short"] * 6), "long", *(["short"] * 4)]},
    "clean": {"leaked": [{"where": "row 3"}]},
}


def evaluated(bits: list[float]) -> Evaluated:
    chosen = Figure.of_rows(Figure(None, np.array(bits), False, SIZES), np.ones(len(bits), dtype=bool))  # type: ignore[arg-type]
    assert chosen is not None
    rows = [{"where": f"row {place}"} for place in range(len(bits))]
    return Evaluated("m", "m", "float32", {"t": TaskResult({"bits_per_byte": chosen}, rows, details=DETAILS)}, {}, [])


def test_a_printed_difference_is_that_of_the_printed_figures_of_all_rows_of_groups_and_of_clean_rows() -> None:
    task = LanguageModelling.model_validate({"name": "t", "kind": "language-modelling", "source": {"kind": "builtin", "name": "stories"}})
    base, tuned = evaluated([1.0 + 0.01 * place for place in range(12)]), evaluated([0.9, *(1.7 + 0.02 * place for place in range(11))])
    (change,) = changes(tuned, base, [task])
    first, second = (one.results["t"].figures["bits_per_byte"] for one in (tuned, base))
    assert change.comparison.difference.value == pytest.approx(first.interval.value - second.interval.value, abs=1e-12)
    # Most rows are worse, and the text as a whole is better: so it is printed.
    assert change.is_better
    assert len(change.lost) > len(change.gained)
    for group in change.groups:
        rows = np.array([name == group["group"] for name in DETAILS["groups"]["rows"]])
        parts = [one.of_rows(rows) for one in (first, second)]
        assert parts[0] is not None
        assert parts[1] is not None
        assert group["difference"]["value"] == pytest.approx(parts[0].interval.value - parts[1].interval.value, abs=1e-12)
    clean = np.arange(12) != 3
    parts = [one.of_rows(clean) for one in (first, second)]
    assert change.clean is not None
    assert parts[0] is not None
    assert parts[1] is not None
    assert change.clean.difference.value == pytest.approx(parts[0].interval.value - parts[1].interval.value, abs=1e-12)
    assert evaluated([1.0] * 12).measured()["t"]["bits_per_byte"].weights is not None
