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


def test_a_folder_of_documents_that_is_not_there_is_an_error_with_its_name(comparison: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (comparison.parent / "documents.jsonl").unlink()
    assert main.run(["compare-approaches", str(comparison)]) == 2
    assert "documents.jsonl" in capsys.readouterr().err
