from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import ROOT

from ftcli.cli.main import run
from ftcli.recipe.schema import json_schema


def test_the_schema_goes_to_stdout_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    path = tmp_path / "recipe.schema.json"
    assert run(["schema", "-o", str(path)]) == 0
    captured = capsys.readouterr()
    assert json.loads(path.read_text()) == json_schema()
    assert (captured.out, captured.err) == ("", f"wrote {path}\n")


def test_a_folder_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "-o", str(tmp_path / "no" / "x.json")]) == 2
    assert capsys.readouterr().err.endswith("cannot be written: no such file or directory\n")
    assert not list(tmp_path.iterdir())


def test_the_schema_in_the_repository_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """Recipes in recipes/ name it. It is made by `ftcli schema -o recipe.schema.json`."""
    assert run(["schema"]) == 0
    assert (ROOT / "recipe.schema.json").read_text(encoding="utf-8") == capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "key"), [("recipe", "method"), ("chain", "stages"), ("evaluation", "tasks"), ("comparison", "approaches")]
)
def test_every_kind_of_file_has_a_schema_of_its_own(kind: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", kind]) == 0
    found = json.loads(capsys.readouterr().out)
    assert key in found["properties"]
    assert found["title"].startswith(f"ftcli {kind}")


def test_a_kind_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema", "recpie"]) == 2
    assert "`recpie` is not one of `recipe`, `chain`" in capsys.readouterr().err
