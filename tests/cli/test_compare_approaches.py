"""`ftcli compare-approaches`: from a file to a verdict, and nothing computed twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli import main

COLOURS = ("red", "green", "blue", "white", "black", "brown", "grey", "pink")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", [{"prompt": f"What colour is hat {n}? ", "completion": COLOURS[n % 8]} for n in range(16)])
    write(tmp_path / "test.jsonl", [{"prompt": f"What colour is hat {n}? ", "completion": COLOURS[n % 8]} for n in range(4)])
    write(tmp_path / "changed.jsonl", [{"prompt": f"What colour is hat {n}? ", "completion": "gold"} for n in range(4)])
    write(tmp_path / "documents.jsonl", [{"text": f"Hat {n} is {COLOURS[n % 8]}."} for n in range(16)])
    write(tmp_path / "stories.jsonl", [{"text": "Once upon a time there was a dog."}, {"text": "Mia had a hat."}])
    retrieve = {"source": {"kind": "file", "path": "documents.jsonl"}, "count": 2, "budget_tokens": 40}
    document = {
        "version": 1,
        "name": "hats",
        "base": "builtin:tiny",
        "task": {
            "name": "hats",
            "kind": "generation",
            "source": {"kind": "file", "path": "test.jsonl"},
            "metrics": [{"kind": "exact-match"}],
            "max_new_tokens": 6,
        },
        "train": [{"source": {"kind": "file", "path": "train.jsonl"}}],
        "approaches": [
            {
                "kind": "prompting",
                "name": "base",
                "variants": {"limit": 3, "prompts": [{"name": "plain"}, {"name": "short", "prompt": "{question} One word: "}]},
            },
            {"kind": "few-shot", "count": 2},
            {"kind": "retrieval", "retrieve": retrieve},
            {"kind": "fine-tuning", "name": "lora", "train": {"steps": 2, "global_batch_size": 4}, "retrieve": retrieve},
        ],
        "retained": [{"name": "stories", "kind": "language-modelling", "source": {"kind": "file", "path": "stories.jsonl"}}],
        "changed": {"source": {"kind": "file", "path": "changed.jsonl"}},
        "timed_requests": 1,
        "output": "out",
    }
    path = tmp_path / "hats.yaml"
    path.write_text(json.dumps(document))
    return path


def test_a_comparison_end_to_end_and_again_from_what_is_kept(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["compare-approaches", str(comparison), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    names = [one["name"] for one in first["approaches"]]
    assert names == ["base", "few-shot", "retrieval", "lora"]
    base, shots, lookup, lora = first["approaches"]
    assert (first["rows"], base["rows"], base["variants"]["validation_rows"]) == (4, 4, 3)
    assert shots["prompt_tokens"] > base["prompt_tokens"]
    assert lookup["prompt_tokens"] > base["prompt_tokens"]
    assert lookup["extra_bytes"] > 0
    assert lora["training"]["steps"] == 2
    assert lora["training"]["tokens"] > 0
    assert lora["changed"]["value"] == 0.0
    assert [(change["approach"], change["task"]) for change in first["retained"]] == [("lora", "stories")]
    folder = comparison.parent / "out"
    assert json.loads((folder / "results.json").read_text())["name"] == "hats"
    assert "<h1>hats: which approach?" in (folder / "report.html").read_text()
    assert "hats: which approach?" in (folder / "report.md").read_text()
    # Passages stand in the rows that were trained on, and no row was handed its own question.
    (rows,) = (folder / "rows").glob("lora-*.jsonl")
    trained = [json.loads(line) for line in rows.read_text().splitlines()]
    assert "Hat" in trained[3]["prompt"].removesuffix("What colour is hat 3? ")

    shutil.rmtree(folder / "recipes")
    assert main.run(["compare-approaches", str(comparison)]) == 0
    shown = capsys.readouterr().out
    assert "is finished: nothing is left to do" in shown
    assert json.loads((folder / "results.json").read_text()) == first
    assert "when facts change:" in shown


def test_rows_that_the_approaches_were_given_are_told_first_and_kept_out_of_prompts(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(comparison.read_text())
    document |= {"approaches": document["approaches"][:3], "retained": [], "changed": None}
    write(comparison.parent / "test.jsonl", [{"prompt": f"What COLOUR is hat {n}?", "completion": COLOURS[n % 8]} for n in range(12, 20)])
    given = [{"text": f"What colour is hat {n}? {COLOURS[n % 8]}"} for n in (13, 14)]
    write(comparison.parent / "documents.jsonl", [{"text": f"Hat {n} is {COLOURS[n % 8]}."} for n in range(20)] + given)
    comparison.write_text(json.dumps(document))
    assert main.run(["compare-approaches", str(comparison), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["shared"] == {
        "rows": {f"test.jsonl:{n}": f"train.jsonl:{n + 12}" for n in range(1, 5)},
        "documents_left_out": {"retrieval": 2},
    }
    warning = "4 of 8 rows of the task are asked in the training rows, too (test.jsonl:1 in train.jsonl:13, "
    assert warning in found["verdict"]["sentences"][0]
    assert f"warning: {warning}" in shown.err
    assert warning in (comparison.parent / "out" / "report.md").read_text()
    assert "On the other rows, exact_match: base " in " ".join(found["verdict"]["sentences"])
    assert all(one["without_shared_rows"] is not None for one in found["approaches"])
    base, shots, lookup = (samples(comparison, name) for name in ("base", "few-shot", "retrieval"))
    assert len(base) == len(shots) == len(lookup) == 8
    for row, looked_up in zip(shots, lookup, strict=True):
        question = row["prompt"].split("\n\n")[-1].lower().strip()
        assert row["prompt"].lower().count(question) == 1
        assert looked_up["prompt"].lower().count(question) == 1
        assert "Hat" in looked_up["prompt"]


def samples(comparison: Path, approach: str) -> list[dict[str, Any]]:
    """The rows of an approach, found by how they are asked: solved examples and passages stand in front of the question."""
    kept = [[json.loads(line) for line in path.read_text().splitlines()] for path in (comparison.parent / "out" / "kept").glob("*.jsonl")]
    marks = {
        "base": lambda text: "\n\n" not in text,
        "few-shot": lambda text: text.count("?") == 3,
        "retrieval": lambda text: "Hat " in text,
    }
    return next(rows for rows in kept if len(rows) == 8 and all(marks[approach](row["prompt"]) for row in rows))


def test_a_folder_of_documents_that_is_not_there_is_an_error_with_its_name(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (comparison.parent / "documents.jsonl").unlink()
    assert main.run(["compare-approaches", str(comparison)]) == 2
    assert "documents.jsonl" in capsys.readouterr().err
