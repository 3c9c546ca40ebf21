"""Options of `ftcli eval` that a recipe may not hold: own metrics and programs that are run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli import main


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Once upon a", "completion": " time"}\n{"prompt": "The dog", "completion": " ran"}\n')
    return path


def asked(rows: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert main.run(["eval", "builtin:tiny", "--data", str(rows), "--limit", "2", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["models"]["builtin:tiny"]["tasks"]["rows"]


def test_own_metrics_are_computed_and_kept_until_their_file_changes(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = rows.parent / "own.py"
    own.write_text("def letters(answer, reference, row):\n    return len(answer)\n")
    first = asked(rows, capsys, "--metrics", str(own))
    assert first["figures"]["letters"]["value"] > 0
    assert asked(rows, capsys, "--metrics", str(own))["reused"]
    assert "letters" not in asked(rows, capsys)["figures"]
    own.write_text("def letters(answer, reference, row):\n    return -len(answer)\n")
    second = asked(rows, capsys, "--metrics", str(own))
    assert not second["reused"]
    assert second["figures"]["letters"]["value"] == -first["figures"]["letters"]["value"]


def test_programs_run_only_where_the_command_line_says_so(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows.write_text(json.dumps({"prompt": "# Once upon a time", "test": "assert True"}) + "\n")
    recipe = rows.parent / "eval.yaml"
    task = {"name": "code", "kind": "code", "source": {"kind": "file", "path": "rows.jsonl"}, "stop": ["\n"], "max_new_tokens": 4}
    recipe.write_text(json.dumps({"version": 1, "tasks": [task]}))
    assert main.run(["eval", "builtin:tiny", "-r", str(recipe)]) == 2
    assert "--allow-code" in capsys.readouterr().err
    assert main.run(["eval", "builtin:tiny", "-r", str(recipe), "--allow-code", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["models"]["builtin:tiny"]["tasks"]["code"]["figures"]["pass_at_1"]["value"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "generatoin"], "did you mean `generation`"),
        (["--metric", "blue"], "did you mean `bleu`"),
        (["--kind", "retrieval"], "corpus: Field required"),
        (["--metrics", "nowhere.py"], "there is no such file"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_hint(
    options: list[str], message: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["eval", "builtin:tiny", "--data", str(rows), *options]) == 2
    assert message in capsys.readouterr().err
