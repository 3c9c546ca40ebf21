from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ftcli.cli.doctor import render
from ftcli.cli.main import run
from ftcli.reporting.machine import look_at_machine, num_cores

METADATA = """\
Metadata-Version: 2.4
Name: ftcli
Version: 9.9
Provides-Extra: wandb
Provides-Extra: odd
Requires-Dist: pydantic>=2
Requires-Dist: typer>=99
Requires-Dist: no-such-package
Requires-Dist: another-missing-package; extra == "wandb"
Requires-Dist: pyyaml; extra == "odd"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed ftcli 9.9 with two extras, one of them there."""
    folder = tmp_path / "ftcli-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("installed")
def test_extras_and_missing_packages_come_from_the_installed_metadata(tmp_path: Path) -> None:
    report = look_at_machine(tmp_path / "not" / "there")
    assert report["ftcli"] == "9.9"
    assert report["packages"]["no-such-package"] is None
    assert report["extras"]["wandb"]["installed"] is False
    assert report["extras"]["odd"]["installed"] is True
    assert "no-such-package is not installed" in report["warnings"]
    assert any(warning.startswith("typer ") and warning.endswith("ftcli needs >=99") for warning in report["warnings"])
    text = render(report)
    assert 'wandb            metrics in Weights & Biases, `trackers: [wandb]`: pip install "ftcli[wandb]"' in text
    assert "odd              pyyaml: installed" in text
    assert "warning: no-such-package is not installed" in text


def test_the_report_is_json_and_counts_what_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu"]["cores"] == num_cores() >= 1
    assert 0 < report["cpu"]["available"] <= report["cpu"]["memory"]
    assert report["packages"]["torch"]
    assert all(free > 0 for free in report["disk"].values())


def test_the_report_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"{num_cores()} cores, " in text
    assert "torch            2." in text
