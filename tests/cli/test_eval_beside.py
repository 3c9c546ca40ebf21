"""`ftcli eval`: groups, clean rows, stages and KL, beside the figures themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcli.cli import main
from ftcli.evaluation.divergence import kl_from_base
from ftcli.evaluation.evaluate import open_subject
from ftcli.evaluation.tasks.language_modelling import LanguageModelling
from ftcli.models.locate import model_folder

TEXTS = [
    {"text": "Once upon a time there was a little dog. He was sad.", "topic": "dogs"},
    {"text": "Mia had a red hat. " * 30, "topic": "hats"},
    {"text": "The mill stood by the river.", "topic": "mills"},
]


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """The embedded model with its last layer turned a little."""
    folder = tmp_path / "moved"
    folder.mkdir()
    for file in model_folder("builtin:tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.4.mlp.down_proj.weight"
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(path: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "file", "path": str(path)}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    task = {"name": "texts", "kind": "language-modelling", "source": written(tmp_path / "texts.jsonl", TEXTS), "retained": True}
    train = written(tmp_path / "train.jsonl", [TEXTS[0], {"text": "Something else altogether, and long enough."}])
    tasks = [{**task, "kl_from_base": True, "group_by": "topic", "leakage": {"train": [train]}}, {**task, "name": "first", "stage": 1}]
    path = tmp_path / "eval.yaml"
    path.write_text(json.dumps({"version": 1, "tasks": tasks}))
    return path


def test_groups_clean_rows_stages_and_kl_stand_in_the_report(recipe: Path, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(moved), "builtin:tiny", "-r", str(recipe), "--against", "builtin:tiny", "--stages", "--json"]
    assert main.run(command) == 0
    report = json.loads(capsys.readouterr().out)
    found = report["models"][str(moved)]["tasks"]["texts"]
    assert [row["group"] for row in found["groups"]["table"]] == ["dogs", "hats", "mills"]
    assert (found["clean"]["rows"], [hit["where"] for hit in found["clean"]["leaked"]]) == (2, ["texts.jsonl:1"])
    change = report["changes"][str(moved)][0]
    assert [group["group"] for group in change["groups"]] == ["dogs", "hats", "mills"]
    assert change["clean"]["rows"] == 2
    assert set(report["divergences"]) == {str(moved)}
    assert report["divergences"][str(moved)]["texts"]["value"] > 0
    stages = report["stages"]
    assert (stages["tasks"], stages["learnt_at"]) == (["texts", "first"], [0, 1])
    # The second model is the base itself: nothing is lost of what it could do, and the first stage's worse figure was regained.
    assert stages["by_task"][0]["backward_transfer"] == 0.0
    assert stages["matrix"][0] == stages["matrix"][2]
    assert stages["forgetting"] == pytest.approx(-stages["by_task"][1]["backward_transfer"] / 2)

    assert main.run(command[:-1]) == 0
    shown = capsys.readouterr().out
    for words in ("KL(base || tuned)", "clean rows: 1 rows stand in the 2 training rows", "topic dogs (1 rows)", "backward transfer:"):
        assert words in shown


def test_a_task_of_a_stage_that_is_not_there_is_an_error(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text().replace('"stage": 1', '"stage": 3'))
    assert main.run(["eval", "builtin:tiny", "-r", str(recipe), "--stages"]) == 2
    assert "`stage: 3`, and there are 1 models" in capsys.readouterr().err


def test_texts_cannot_be_asked_otherwise(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text().replace('"stage": 1', '"variants": {"prompts": [{"name": "a"}, {"name": "b"}]}'))
    assert main.run(["eval", "builtin:tiny", "-r", str(recipe)]) == 2
    assert "kind `language-modelling` asks none" in capsys.readouterr().err


def test_the_rows_that_flipped_are_told_and_written(tmp_path: Path, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "Once upon a", "choices": [" time", " qq", " dog", " hat"], "answer": n % 4} for n in range(12)]
    task = {"name": "quiz", "kind": "multiple-choice", "source": written(tmp_path / "quiz.jsonl", rows), "prompt": "{question}"}
    path = tmp_path / "eval.yaml"
    path.write_text(json.dumps({"version": 1, "tasks": [{**task, "separator": ""}]}))
    command = ["eval", str(moved), "-r", str(path), "--against", "builtin:tiny", "-o", str(tmp_path / "out")]
    assert main.run(command) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    (change,) = report["changes"][str(moved)]
    flips = [json.loads(line) for line in (tmp_path / "out" / "flips-quiz-0.jsonl").read_text().splitlines()]
    assert [flip["where"] for flip in flips if flip["flip"] == "lost"] == change["lost"]
    assert [flip["where"] for flip in flips if flip["flip"] == "gained"] == change["gained"]
    assert all(flip["before"]["accuracy"] != flip["after"]["accuracy"] for flip in flips)
    assert f"right in both {change['kept']}, lost {len(change['lost'])}" in shown


@pytest.mark.parametrize("window", [None, 32])
def test_kl_is_that_of_the_whole_distributions_and_0_against_itself(window: int | None, tmp_path: Path, moved: Path) -> None:
    document = {"name": "t", "kind": "language-modelling", "source": written(tmp_path / "t.jsonl", TEXTS), "window": window}
    task = LanguageModelling.model_validate(document)
    base, tuned = open_subject("builtin:tiny", "cpu")[1], open_subject(str(moved), "cpu")[1]
    itself = kl_from_base(task, base, base)
    assert itself is not None
    assert itself.values is not None
    assert np.abs(itself.values).max() == 0.0
    found = kl_from_base(task, base, tuned)
    assert found is not None
    assert found.interval.value > 0.001
    if window is not None:
        return
    expected, count = 0.0, 0
    for subject in (base, tuned):
        subject.model.use_layout("rows")
    for row in TEXTS:
        ids = torch.tensor([[base.tokenizer.eos_id, *base.tokenizer.encode(row["text"])[0]]])
        with torch.inference_mode():
            before, after = (subject.model.module(ids).logits[0, :-1].double().log_softmax(-1) for subject in (base, tuned))
        expected += float((before.exp() * (before - after)).sum())
        count += ids.shape[1] - 1
    assert found.interval.value == pytest.approx(expected / count, rel=1e-3)
    assert math.isfinite(found.interval.high)
