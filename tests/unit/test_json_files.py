"""Files that programs read are JSON to every one of them: no NaN, no infinity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ftcli.files import json_text, write_exact_json, write_json
from ftcli.training.hooks import Metrics
from ftcli.training.stages import beginning_proofs


def strict(text: str) -> Any:
    """`text` as a parser reads it that knows JSON alone."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"`{word}` is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": math.nan, "interval": (-math.inf, np.float64(math.inf)), "text": "NaN", "is": True, "n": 3})
    assert strict((tmp_path / "a.json").read_text()) == {"loss": None, "interval": [None, None], "text": "NaN", "is": True, "n": 3}
    assert strict(json_text([1.5, {"deep": [math.inf]}])) == [1.5, {"deep": [None]}]


def test_state_is_read_back_as_it_was(tmp_path: Path) -> None:
    write_exact_json(tmp_path / "a.json", {"best": math.inf, "lr": 0.1 + 0.2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"best": math.inf, "lr": 0.1 + 0.2}


def test_metrics_of_a_run_that_diverges_are_json(tmp_path: Path) -> None:
    accelerator: Any = SimpleNamespace(is_main_process=True, trackers=[])
    Metrics(tmp_path / "metrics.jsonl", accelerator).write({"step": 1, "grad_norm": math.inf, "sources": {"a": {"loss": math.nan}}})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "grad_norm": None, "sources": {"a": {"loss": None}}}


@pytest.mark.parametrize(("ended", "begun", "passed"), [(1.0, 1.0, True), (None, 1.0, False), (1.0, None, False), (None, None, False)])
def test_a_stage_whose_loss_is_no_number_is_not_proven_to_go_on(ended: float | None, begun: float | None, passed: bool) -> None:
    first, second = ({"before": {}, "after": {}} for _ in range(2))
    first["after"] = {"orders": {"loss": ended, "targets": 5}}
    second["before"] = {"orders": {"loss": begun, "targets": 5}}
    assert beginning_proofs(["one", "two"], [first, second])[0]["passed"] == passed
