"""`ftcli data audit`: words, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftcli.cli import main


def write(path: Path, questions: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": "a"}) + "\n" for text in questions))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    train = write(tmp_path / "train.jsonl", ["the quick brown fox jumps over the lazy dog", "something else entirely is said here"])
    test = write(tmp_path / "test.jsonl", ["The quick brown fox, jumps over the lazy dog!", "nothing of this was ever seen before"])
    return ["--train", str(train), "--evaluation", str(test)]


def test_audit_names_file_and_line_and_can_stop_a_pipeline(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", "audit", *files, "--fail"]) == 3
    captured = capsys.readouterr()
    assert "test.jsonl:1  same-words 100% of  train.jsonl:1" in captured.out
    assert "1 of 2 evaluation rows stand in the training data" in captured.err


def test_audit_as_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", "audit", *files, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [hit["where"] for hit in report["leaked"]] == ["test.jsonl:1"]


def test_audit_of_nothing_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", "audit"]) == 2
    assert "needs a recipe, or --train FILE" in capsys.readouterr().err
