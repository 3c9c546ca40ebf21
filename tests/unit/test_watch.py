"""What `ftcli watch` shows of runs in every state, on terminals of every size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.fake_run import write_fake_run

from ftcli.cli import main
from ftcli.reporting.found_run import read_run
from ftcli.reporting.watch import chart, series_of, watch_lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_fake_run(tmp_path / "orders")
    return tmp_path / "orders"


def test_every_source_and_the_rates_have_a_curve(run: Path) -> None:
    names = list(series_of(read_run(run)))
    assert names[:2] == ["training loss, orders", "training loss, stories"]
    assert {"evaluation loss, orders", "gradient norm", "learning rate", "targets per second"} <= set(names)


@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (200, 60)])
def test_the_view_fits_the_terminal_and_says_how_the_run_stands(run: Path, width: int, height: int) -> None:
    lines = watch_lines(read_run(run), 0.0, width, height)
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert "finished, step 40 of 40" in lines[0] + lines[1]
    assert any(line.startswith("training loss, orders") for line in lines)


def test_a_falling_curve_falls_and_a_level_one_is_level() -> None:
    falling = chart([(step, 10.0 - step) for step in range(10)], 10, 1)
    drawn = falling[0].split("|")[1]
    assert drawn == "".join(sorted(drawn, reverse=True))
    assert drawn[0] == "█"
    assert set(chart([(1, 3.0), (2, 3.0)], 2, 1)[0].split("|")[1]) == {"▁"}


def test_few_points_make_a_narrow_chart() -> None:
    lines = chart([(1, 4.0), (2, 3.0), (3, 2.5), (4, 1.0)], 150, 2)
    assert [line.split("|")[1] for line in lines] == ["█▃▁ ", "███▁"]
    assert max(len(line.split("|")[1]) for line in chart([(step, float(step)) for step in range(500)], 150, 2)) == 150


def test_a_run_that_has_just_begun_or_has_a_loss_that_is_no_number_can_be_watched(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_text("")
    assert main.run(["watch", str(run), "--once"]) == 0
    record = {"kind": "train", "step": 1, "loss": float("nan"), "sources": {"orders": float("nan")}, "seconds": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps({**record, "step": step}) + "\n" for step in (1, 2)))
    assert main.run(["watch", str(run), "--once"]) == 0
    assert "step 2 of 40" in capsys.readouterr().out


def test_no_such_run_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["watch", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
