"""The workflows in docs/ci.md can be copied: they parse, and their ftcli commands run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from tests.conftest import ROOT

from ftcli.cli.main import run as ftcli

BLOCKS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), flags=re.DOTALL)]
WORKFLOWS: list[dict[str, Any]] = [block for block in BLOCKS if "jobs" in block]
RECIPES: list[dict[str, Any]] = [block for block in BLOCKS if "jobs" not in block]


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(workflow: dict[str, Any]) -> list[list[str]]:
    """The ftcli commands of a workflow, in order, as a shell splits them."""
    lines = [line for step in steps(workflow) for line in step.get("run", "").replace("\\\n", " ").splitlines()]
    return [words[1:] for words in map(shlex.split, lines) if words[:1] == ["ftcli"]]


def test_the_workflows_have_what_the_runner_needs() -> None:
    assert len(WORKFLOWS) == 2
    for workflow in WORKFLOWS:
        # YAML reads the key `on` as true
        assert True in workflow
        assert all("run" in step or "uses" in step for step in steps(workflow))
        assert all("@" in step["uses"] for step in steps(workflow) if "uses" in step)
    uses = [step["uses"].partition("@")[0] for step in steps(WORKFLOWS[1]) if "uses" in step]
    assert {"actions/upload-artifact", "mikepenz/action-junit-report"} <= set(uses)


def test_their_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name, recipe in zip(("orders", "judge"), RECIPES, strict=True):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    for workflow in WORKFLOWS:
        for command in commands(workflow):
            assert ftcli(command) == 0, command
    suites = ElementTree.parse(tmp_path / "results" / "gates.xml").getroot()
    assert (suites.get("tests"), suites.get("failures")) == ("2", "0")
    assert {"report.html", "report.md", "results.json"} <= {path.name for path in (tmp_path / "results").iterdir()}
    assert (tmp_path / "runs" / "orders" / "adapter").is_dir()
    judge = commands(WORKFLOWS[1])[2]
    assert ftcli([*judge, "--gate", "stories.bits_per_byte <= 0.001"]) == 3
    assert ElementTree.parse(tmp_path / "results" / "gates.xml").getroot().get("failures") == "1"
