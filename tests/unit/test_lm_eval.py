"""lm-evaluation-harness: our model under its tasks, and our results in its JSON."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ftcli.cli import main
from ftcli.errors import MissingExtraError
from ftcli.evaluation.evaluate import Evaluated, open_subject
from ftcli.evaluation.tasks import Task
from ftcli.reporting.lm_eval_results import lm_eval_document

ROWS = [
    {"question": f"{word} is a", "choices": ["toy", "xylophone"], "answer": place % 2}
    for place, word in enumerate(["ball", "dog", "cat", "sun"])
]
TASK_FILE = """task: quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def write(folder: Path) -> Path:
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_our_results_are_written_as_the_harness_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    path, out = write(tmp_path), tmp_path / "out"
    assert main.run(["eval", "builtin:tiny", "--data", str(path), "--kind", "multiple-choice", "--lm-eval-json", str(out), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["models"]["builtin:tiny"]["tasks"]["quiz"]["figures"]
    (results,) = (out / "builtin__tiny").glob("results_*.json")
    document = json.loads(results.read_text())
    found = document["results"]["quiz"]
    assert found["acc,none"] == figures["accuracy"]["value"]
    assert found["acc_norm,none"] == figures["accuracy_by_character"]["value"]
    share = found["acc,none"]
    assert found["acc_stderr,none"] == pytest.approx(math.sqrt(share * (1 - share) / 3))  # of four rows, as the harness divides
    assert document["n-samples"]["quiz"] == {"original": 4, "effective": 4}
    assert document["higher_is_better"]["quiz"]["acc"] is True
    (samples,) = (out / "builtin__tiny").glob("samples_quiz_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1, 2, 3]
    assert [line["target"] for line in lines] == [0, 1, 0, 1]
    assert sum(line["acc"] for line in lines) / 4 == share
    assert all(len(line["resps"]) == 2 for line in lines)


def test_a_figure_that_is_no_plain_mean_has_no_standard_error(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "Once upon a time"}\n{"text": "The dog ran to Mia."}\n')
    document = {"name": "t", "kind": "language-modelling", "source": {"kind": "file", "path": str(tmp_path / "t.jsonl")}}
    task = TypeAdapter(Task).validate_python(document, strict=False)
    result = task.measure(open_subject("builtin:tiny", "cpu")[1])
    found = Evaluated("x", "x", "float32", {"t": result}, {"t": 1.0}, [])
    told = lm_eval_document(found, [task], datetime(2026, 1, 1))
    assert told["results"]["t"]["bits_per_byte_stderr,none"] == "N/A"
    assert told["higher_is_better"]["t"]["bits_per_byte"] is False


def harness_task(folder: Path, **settings: Any) -> Any:
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "quiz.yaml").write_text(TASK_FILE.format(path=write(folder)))
    source = {"kind": "lm-eval", "path": str(folder / "tasks")}
    document = {"name": "quiz", "kind": "lm-eval", "task": "quiz", "source": source, **settings}
    return TypeAdapter(Task).validate_python(document, strict=False)


def test_without_the_extra_its_tasks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"ftcli\[lm-eval\]"):
        harness_task(tmp_path).measure(open_subject("builtin:tiny", "cpu")[1])


def test_a_task_of_the_harness_gives_what_our_own_gives(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    _, subject = open_subject("builtin:tiny", "cpu")
    theirs = harness_task(tmp_path).measure(subject)
    document = {"name": "quiz", "kind": "multiple-choice", "source": {"kind": "file", "path": str(write(tmp_path))}, "prompt": "{question}"}
    ours = TypeAdapter(Task).validate_python(document, strict=False).measure(subject)
    assert theirs.figures["acc"].values.tolist() == ours.figures["accuracy"].values.tolist()
    assert theirs.figures["acc_norm"].values.tolist() == ours.figures["accuracy_by_character"].values.tolist()
