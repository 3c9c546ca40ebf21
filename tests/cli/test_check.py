"""`ftcli check` as a user meets it: rows with their mask, a report for machines, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

from ftcli.cli.main import run

RECIPE = """version: 1
name: tiny
model: {init: {architecture: llama, config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}}, \
tokenizer: "builtin:tiny"}
data:
  train:
    - {source: {kind: file, path: sums.jsonl}}
  evaluation:
    - {name: more, source: {kind: file, path: sums.jsonl}, limit: 3}
  max_length: 256
method: {kind: lora, rank: 2}
train: {steps: 2, global_batch_size: 4, device: cpu}
"""


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n), "score": n} for n in range(8)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "weight": 0}]))
    Path("tiny.yaml").write_text(RECIPE)


def test_check_shows_rows_with_their_mask_and_all_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "tiny.yaml", "--show", "2", "--set", "train.lr=1e-3"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    titles = [line.split(",")[0] for line in lines if line.startswith("---")]
    assert titles == ["--- sums row 1", "--- sums row 2", "--- more row 1", "--- more row 2"]
    assert lines[1] == "0 + 0 = ⟦0<|endoftext|>⟧"
    assert lines[3] == "1 + 1 = ⟦2<|endoftext|>⟧"
    assert "format of `sums` is `completion`, found from its columns" in lines
    assert "`sums` reads columns prompt, completion only; not read: score" in lines
    assert "1 of 9 rows of `sums` left out: no target" in lines
    assert "3 examples of evaluation source `more` are trained on, too: its figures will look better than they are" in lines
    assert "layout: forest (the probe equals rows)" in lines
    assert lines[-2:] == ["next:", "  ftcli train tiny.yaml --set train.lr=1e-3"]
    assert sorted(file.name for file in Path().rglob("*")) == ["sums.jsonl", "tiny.yaml"]


def test_check_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "tiny.yaml", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [source["dropped"] for source in report["sources"]] == [{"no target": 1}, {}]
    assert report["audit"]["num_overlap"] == {"more": 3}
    assert (report["steps"], report["layout"]["layout"]) == (2, "forest")
    assert report["parameters"]["trainable"] < report["parameters"]["total"]
    assert captured.err.endswith("ok: tiny.yaml\n")


def test_check_fast_shows_rows_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ftcli.cli.main import run; code = run(['check', 'tiny.yaml', '--fast', '--show', '1']);"
        "print(code, {'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("--- sums (sums.jsonl:1), ")
    assert lines[1] == "0 + 0 = ⟦0<|endoftext|>⟧"
    assert lines[2].startswith("--- more (sums.jsonl:1), ")
    assert lines[4].startswith("train sums (completion, found from its columns): first 9 rows, 8 examples, ")
    assert lines[4].endswith("% trained, 1 dropped: no target")
    assert lines[5] == "sums reads columns prompt, completion only; not read: score"
    assert lines[-2:] == ["  ftcli train tiny.yaml", "0 set()"]


def test_check_fast_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "tiny.yaml", "--fast", "--json", "--show", "1"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [(source["name"], source["num_examples"], source["dropped"]) for source in report["sources"]] == [
        ("sums", 8, {"no target": 1}),
        ("more", 3, {}),
    ]
    assert "⟦0<|endoftext|>⟧" in captured.err


def test_check_says_that_the_run_folder_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs/tiny")
    folder.mkdir(parents=True)
    (folder / "recipe.resolved.yaml").write_text(RECIPE)
    assert run(["check", "tiny.yaml"]) == 0
    assert "already holds a run: `ftcli train --resume` goes on with it" in capsys.readouterr().out
