"""`ftcli eval` finds what is wrong before it computes: rows of every task, permissions, metrics that leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli import main

TEXTS = [{"text": "Once upon a time there was a little dog."}]


def recipe(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], task: dict[str, Any]) -> list[str]:
    """A task that is right, and then one that is not; nothing may be measured."""
    monkeypatch.setenv("FTCLI_CACHE", str(folder / "cache"))
    monkeypatch.setattr("ftcli.evaluation.evaluate.measure_task", lambda *_, **__: pytest.fail("a task was measured"))
    for name, listed in (("texts", TEXTS), ("last", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    first = {"name": "texts", "kind": "language-modelling", "source": {"kind": "file", "path": "texts.jsonl"}}
    last = {"name": "last", "source": {"kind": "file", "path": "last.jsonl"}, **task}
    (folder / "eval.yaml").write_text(json.dumps({"version": 1, "tasks": [first, last]}))
    return ["eval", "builtin:tiny", "-r", str(folder / "eval.yaml")]


GOOD_CHOICE = {"question": "Once upon a", "choices": ["time", "dog"], "answer": 0}
GOOD_PAIR = {"prompt": "Once", "chosen": "upon a time", "rejected": "zz"}


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ({"kind": "multiple-choice"}, [GOOD_CHOICE, {**GOOD_CHOICE, "choices": ["time"]}], "there is one choice alone"),
        ({"kind": "multiple-choice"}, [GOOD_CHOICE, {**GOOD_CHOICE, "choices": ["a", "b", " a"]}], "`a` stands there twice"),
        ({"kind": "multiple-choice"}, [GOOD_CHOICE, {**GOOD_CHOICE, "choices": ["a", " "]}], "choice 1 (counted from 0) is empty"),
        ({"kind": "multiple-choice"}, [GOOD_CHOICE, {**GOOD_CHOICE, "choices": ["a", "word " * 3000]}], "tokens, the model sees"),
        ({"kind": "preference"}, [GOOD_PAIR, {**GOOD_PAIR, "chosen": "word " * 3000}], "tokens, the model sees"),
        ({"kind": "preference"}, [GOOD_PAIR, {"prompt": "a", "chosen": "b"}], "column `rejected` is missing"),
        ({"kind": "preference"}, [GOOD_PAIR, {**GOOD_PAIR, "rejected": " upon a time"}], "hold the same answer"),
        ({"kind": "multiple-choice"}, [GOOD_CHOICE, {**GOOD_CHOICE, "choices": [5, 0], "answer": 0}], "say which with `answers: index`"),
        ({"kind": "language-modelling"}, [*TEXTS, {"text": [1]}], "column `text` is list"),
        ({"kind": "classification"}, [{"text": "a", "label": "x"}, {"text": "b"}], "column `label` is missing"),
        (
            {"kind": "generation", "metrics": [{"kind": "exact-match"}]},
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}],
            "completion",
        ),
        (
            {"kind": "retrieval", "corpus": {"kind": "file", "path": "texts.jsonl"}, "document_id": "text", "document": "{text}"},
            [{"query": "a", "relevant": [TEXTS[0]["text"]]}, {"query": "a", "relevant": ["nowhere"]}],
            "there is no document `nowhere`",
        ),
    ],
)
def test_a_row_of_the_last_task_is_named_before_the_first_is_measured(
    task: dict[str, Any],
    rows: list[dict[str, Any]],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.run(recipe(tmp_path, monkeypatch, rows, task)) == 2
    said = capsys.readouterr().err
    assert "last.jsonl:2" in said
    assert message in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"validation": {"kind": "file", "path": "last.jsonl"}}}, "all 2 rows of `validation` are asked in the rows"),
        ({"variants": {}, "limit": 1}, "1 rows are too few to choose a prompt"),
        ({"shots": {"count": 1, "source": {"kind": "file", "path": "texts.jsonl"}}}, "texts.jsonl:1: column `question` is missing"),
    ],
)
def test_what_a_task_takes_beside_its_rows_is_looked_at_before_the_first_is_measured(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "variants" in changes:
        changes = {**changes, "variants": {**changes["variants"], "prompts": [{"name": "a"}, {"name": "b", "prompt": "Now {question}"}]}}
    rows = [GOOD_CHOICE, {**GOOD_CHOICE, "question": "Twice upon a"}]
    assert main.run(recipe(tmp_path, monkeypatch, rows, {"kind": "multiple-choice", **changes})) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("variants", {"prompts": [{"name": "a"}, {"name": "b"}]}), ("group_by", "x"), ("leakage", {})])
def test_what_the_harness_cannot_have_is_refused_without_a_model(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftcli.evaluation.evaluate.open_subject", lambda *_: pytest.fail("a model was loaded"))
    path = tmp_path / "eval.yaml"
    path.write_text(json.dumps({"version": 1, "tasks": [{"name": "t", "kind": "lm-eval", "task": "arc_easy", key: value}]}))
    assert main.run(["eval", "builtin:tiny", "-r", str(path)]) == 2
    assert f"`{key}` reads the rows, and those of kind `lm-eval` are the harness's" in capsys.readouterr().err


def test_permission_to_run_programs_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftcli.evaluation.evaluate.open_subject", lambda *_: pytest.fail("a model was loaded"))
    rows = [{"prompt": "def f():\n", "test": "def check(f):\n    pass", "entry_point": "f"}]
    assert main.run(recipe(tmp_path, monkeypatch, rows, {"kind": "code"})) == 2
    assert "--allow-code" in capsys.readouterr().err


LEAVING = {
    "exit": ("import sys\nsys.exit(0)\ndef own(answer, reference, row):\n    return 1.0\n", "own.py:2: SystemExit: 0"),
    "in the metric": ("import sys\ndef own(answer, reference, row):\n    sys.exit(0)\n", "own.py:3: SystemExit: 0"),
    "its own": ("class Gone(BaseException):\n    pass\ndef own(answer, reference, row):\n    raise Gone('x')\n", "own.py:4: Gone: x"),
    "quit": ("raise SystemExit\n", "own.py:1: SystemExit"),
}


@pytest.mark.parametrize("case", LEAVING)
def test_metrics_that_leave_are_an_error_and_pass_no_gate(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    source, message = LEAVING[case]
    (tmp_path / "own.py").write_text(source)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Once upon a", "completion": "time"}) + "\n")
    asked = ["eval", "builtin:tiny", "--data", str(tmp_path / "rows.jsonl"), "--metrics", str(tmp_path / "own.py")]
    assert main.run([*asked, "--gate", "rows.exact_match >= 0"]) == 2
    assert message in capsys.readouterr().err
