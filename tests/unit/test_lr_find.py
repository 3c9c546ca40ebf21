"""The range test: what it says of curves known by hand, and that it leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from ftcli.cli.main import run
from ftcli.errors import RunError
from ftcli.reporting.rate_plot import plot_rates, rate_table
from ftcli.training.lr_find import RateCurve, judged, rising

RATES = rising(1e-6, 1.0, 61)


def falling_then_rising() -> RateCurve:
    """A loss that falls as a logistic curve around 1e-3, is least near 1e-2, and explodes from 1e-1 on."""
    losses = [4.0 - 3.0 / (1 + (1e-3 / lr) ** 1.5) + (lr / 0.1) ** 3 for lr in RATES]
    return judged(RATES, losses, 2e-4, ended_early=False)


def test_rates_rise_by_the_same_factor() -> None:
    rates = rising(1e-5, 1e-1, 9)
    assert (rates[0], rates[-1]) == (1e-5, pytest.approx(1e-1))
    assert [second / first for first, second in itertools.pairwise(rates)] == pytest.approx([10**0.5] * 8)


def test_a_curve_known_by_hand_is_read_as_it_was_made() -> None:
    curve = falling_then_rising()
    assert curve.steepest == pytest.approx(1e-3, rel=0.6)
    assert curve.lowest is not None
    assert 5e-3 < curve.lowest < 5e-2
    assert curve.diverges is not None
    assert 5e-2 < curve.diverges < 2e-1
    assert curve.suggestion == curve.steepest


def test_the_suggestion_stays_a_tenth_below_where_it_diverges() -> None:
    losses = [4.0 if lr < 1e-2 else 1.0 if lr < 3e-2 else 9.0 for lr in RATES]
    curve = judged(RATES, losses, 2e-4, ended_early=False)
    assert curve.diverges is not None
    assert curve.suggestion == pytest.approx(curve.diverges / 10)
    assert curve.steepest is not None
    assert curve.suggestion < curve.steepest


@pytest.mark.parametrize("losses", [[2.0] * 61, [2.0 + number for number in range(61)]], ids=["flat", "rising"])
def test_where_the_loss_falls_nowhere_there_is_no_suggestion(losses: list[float]) -> None:
    curve = judged(RATES, losses, 2e-4, ended_early=False)
    assert (curve.suggestion, curve.steepest, curve.lowest) == (None, None, None)


def test_a_run_that_breaks_at_once_says_at_which_rate() -> None:
    with pytest.raises(RunError, match=r"no finite number after 3 steps, at a learning rate of 1\.6e-06"):
        judged(RATES[:3], [2.0, 2.0, 2.0], 2e-4, ended_early=True)


def test_the_table_shows_every_mark_and_fits_a_terminal() -> None:
    lines = rate_table(falling_then_rising())
    assert all(len(line) <= 80 for line in lines)
    for word in ("suggested", "steepest", "lowest", "diverges"):
        assert sum(word in line for line in lines) == 1


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_what_its_name_says(suffix: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot_rates(falling_then_rising(), tmp_path / f"{name}.{suffix}")
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert content[:4] == (b"\x89PNG" if suffix == "png" else b"<?xm")
    assert (tmp_path / f"b.{suffix}").read_bytes() == content


def recipe_file(folder: Path) -> Path:
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    document = {
        "version": 1,
        "name": "found",
        "model": {"init": {"architecture": "llama", "config": config}, "tokenizer": "builtin:tiny"},
        "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 12}], "max_length": 128},
        "method": {"kind": "full"},
        "train": {"epochs": 3, "global_batch_size": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document))
    return path


def test_it_finds_a_rate_that_learns_and_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe_file(tmp_path)
    assert run(["lr-find", str(path), "--json", "--steps", "40"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["lr-find-found.svg", "recipe.yaml"]
    assert report["lrs"][0] == pytest.approx(report["default_lr"] / 1000)
    assert report["lrs"][0] < report["suggestion"] <= report["steepest"] < report["lowest"]
    assert len(report["lrs"]) == len(report["losses"]) <= 40
    # the first rates move nothing: without the differences between batches the curve is flat there
    assert max(report["losses"][:8]) - min(report["losses"][:8]) < 0.05
    assert math.isfinite(report["diverges"])


def test_what_makes_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(recipe_file(tmp_path))
    for arguments, words in (
        (["--steps", "3"], "--steps: found 3, allowed: 20 and more"),
        (["--from", "0"], "--from: found 0, allowed: above 0"),
        (["--from", "1", "--to", "0.1"], "--to: found 0.1, allowed: above `--from` (1)"),
        (["--plot", "a.gif"], "--plot: found `a.gif`, allowed: .svg, .png"),
    ):
        assert run(["lr-find", path, *arguments]) == 2
        assert words in capsys.readouterr().err
    # what the range begins with by default is known with the model alone
    assert run(["lr-find", path, "--to", "1e-12"]) == 2
    assert "--to: found 1e-12, allowed: above `--from` (" in capsys.readouterr().err


def test_a_chain_has_no_rate_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "chain.yaml").write_text("version: 1\nname: chain\nstages: []\n")
    assert run(["lr-find", str(tmp_path / "chain.yaml")]) == 2
    assert "lr-find is for one run, not for a recipe with stages" in capsys.readouterr().err
