"""What `ftcli eval -o` leaves is JSON to every program, and stages of several figures are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli import main


def strict(text: str) -> Any:
    """`text` as a parser reads it that knows JSON alone."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"`{word}` is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_one_row_has_no_interval_and_the_files_say_so_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "Once upon a time there was a little dog."}) + "\n")
    task = {"name": "texts", "kind": "language-modelling", "source": {"kind": "file", "path": str(tmp_path / "one.jsonl")}}
    recipe = tmp_path / "eval.json"
    recipe.write_text(json.dumps({"version": 1, "tasks": [task]}))
    asked = ["eval", "builtin:tiny", "builtin:tiny", "-r", str(recipe), "--against", "builtin:tiny"]
    for again in (False, True):  # the second time from what is kept
        folders = ["-o", str(tmp_path / "out"), "--lm-eval-json", str(tmp_path / "lm")]
        assert main.run([*asked, *folders]) == 0
        report = strict((tmp_path / "out" / "results.json").read_text())
        found = report["models"]["builtin:tiny"]["tasks"]["texts"]
        assert found["reused"] == again
        assert found["figures"]["bits_per_byte"]["value"] > 0
        assert (found["figures"]["bits_per_byte"]["low"], found["figures"]["bits_per_byte"]["high"]) == (None, None)
    for path in [*tmp_path.rglob("out/*.jsonl"), *tmp_path.rglob("samples_*.jsonl")]:
        assert [strict(line) for line in path.read_text().splitlines()]
    assert [strict(path.read_text()) for path in tmp_path.rglob("results_*.json")]
    capsys.readouterr()


def test_stages_have_no_mean_over_tasks_of_several_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Once upon a time.", "The dog was sad.")))
    rows = [{"question": f"{a} and {a}?", "choices": ["yes", "no"], "answer": a % 2} for a in range(4)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(name: str, kind: str, stage: int) -> dict[str, Any]:
        file = "texts.jsonl" if kind == "language-modelling" else "choices.jsonl"
        return {"name": name, "kind": kind, "source": {"kind": "file", "path": str(tmp_path / file)}, "stage": stage}

    mixed = [task("texts", "language-modelling", 1), task("yes-no", "multiple-choice", 1)]
    for tasks in (mixed, [mixed[1], task("no-yes", "multiple-choice", 2)]):
        recipe = tmp_path / "eval.json"
        recipe.write_text(json.dumps({"version": 1, "tasks": tasks}))
        command = ["eval", "builtin:tiny", "builtin:tiny", "-r", str(recipe), "--stages"]
        assert main.run([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["stages"]
        assert main.run(command) == 0
        shown = capsys.readouterr().out
        if tasks is not mixed:
            assert found["average"] == found["measures"]["accuracy"]["average"] == sum(found["matrix"][-1]) / 2
            assert "accuracy (2 tasks): average:" in shown
            continue
        assert (found["figures"], found["turned"]) == (["bits_per_byte", "accuracy"], [True, False])
        assert (found["average"], found["backward_transfer"], found["forgetting"]) == (None, None, None)
        assert found["measures"]["bits_per_byte"]["average"] == found["matrix"][-1][0] < 0
        assert "texts (stage 1; bits per byte, less is better)  yes-no (stage 1; accuracy)" in shown
        figure = f"{-found['matrix'][-1][0]:.4g}"
        assert f"bits per byte (1 task, sign of transfers turned: above 0 is a gain): average: {figure}; backward transfer: +0" in shown
        assert f"builtin:tiny  {figure} " in shown
