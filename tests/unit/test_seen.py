"""The rows that a run has trained on: those its steps drew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ftcli.evaluation.evaluate import open_subject, training_rows
from ftcli.evaluation.measurement import measure_task
from ftcli.evaluation.tasks import Task
from ftcli.recipe.load import load_recipe
from ftcli.training.seen import rows_seen


def recipe(folder: Path, data: dict[str, Any], **train: Any) -> Any:
    for name in ("new", "old"):
        lines = [json.dumps({"prompt": f"{name} question {n}", "completion": f"answer {n}"}) + "\n" for n in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps({"version": 1, "name": "r", "model": {"base": "builtin:tiny"}, "data": data, "train": {"global_batch_size": 4, **train}})
    )
    return load_recipe(path).recipe


def source(name: str, **settings: Any) -> dict[str, Any]:
    return {"source": {"kind": "file", "path": f"{name}.jsonl"}, **settings}


def places(rows: Any) -> list[str]:
    return [where for where, _ in rows]


def test_a_limit_and_rows_held_out_count(tmp_path: Path) -> None:
    limited = recipe(tmp_path, {"train": [source("new", limit=10)], "holdout": 0.0}, epochs=1)
    assert places(rows_seen(limited, 100)) == [f"new.jsonl:{n}" for n in range(1, 11)]
    held = recipe(tmp_path, {"train": [source("new")], "holdout": 0.25}, epochs=1)
    assert len(places(rows_seen(held, 100))) == 30
    none = recipe(tmp_path, {"train": [source("new")], "holdout": 0.0}, epochs=1)
    assert len(places(rows_seen(none, 100))) == 40


def test_a_run_of_few_steps_has_seen_few_rows(tmp_path: Path) -> None:
    short = recipe(tmp_path, {"train": [source("new")], "holdout": 0.0}, steps=5)
    first, all_five = places(rows_seen(short, 1)), places(rows_seen(short, 5))
    assert (len(first), len(all_five)) == (4, 20)
    assert set(first) < set(all_five)


def test_of_replay_those_rows_count_that_its_share_drew(tmp_path: Path) -> None:
    mixed = recipe(
        tmp_path,
        {"train": [source("new"), source("old", role="replay")], "mixture": {"kind": "replay", "share_of_new": 0.75}},
        steps=8,
    )
    found = places(rows_seen(mixed, 8))
    assert 20 < sum(where.startswith("new") for where in found) < 28
    assert 4 < sum(where.startswith("old") for where in found) < 12


def test_a_row_that_is_left_out_is_not_seen(tmp_path: Path) -> None:
    made = recipe(tmp_path, {"train": [source("new")], "holdout": 0.0, "max_length": 64, "on_overflow": "drop"}, epochs=1)
    lines = (tmp_path / "new.jsonl").read_text().splitlines()
    lines[3] = json.dumps({"prompt": "long " * 200, "completion": "x"})
    (tmp_path / "new.jsonl").write_text("\n".join(lines) + "\n")
    assert "new.jsonl:4" not in places(rows_seen(made, 100))
    assert len(places(rows_seen(made, 100))) == 39


def test_what_a_run_has_trained_on_is_found_from_the_run_its_artefact_and_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in (run / "adapter", run / "checkpoints" / "step-000002"):
        folder.mkdir(parents=True)
    recipe(run, {"train": [source("new", limit=20)], "holdout": 0.0}, steps=4)
    (run / "recipe.yaml").rename(run / "recipe.resolved.yaml")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"kind": "train", "step": step, "loss": 1.0}) + "\n" for step in range(1, 5)))
    ((whole,), (artefact,), (early,)) = (training_rows(str(place)) for place in (run, run / "adapter", run / "checkpoints" / "step-000002"))
    assert len(list(whole.rows())) == len(list(artefact.rows())) == 16
    assert len(list(early.rows())) == 8
    assert set(places(early.rows())) < set(places(whole.rows()))
    assert whole.fingerprint() == artefact.fingerprint() != early.fingerprint()
    assert training_rows("builtin:tiny") == []


def test_rows_of_the_file_that_the_run_did_not_see_are_clean(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    recipe(run, {"train": [source("new", limit=10)], "holdout": 0.0}, epochs=1)
    (run / "recipe.yaml").rename(run / "recipe.resolved.yaml")
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 3, "loss": 1.0}) + "\n")
    task = TypeAdapter(Task).validate_python(
        {
            "name": "t",
            "kind": "language-modelling",
            "text": "prompt",
            "leakage": {"min_near": 1.0},
            "source": {"kind": "file", "path": str(run / "new.jsonl")},
        }
    )
    clean = measure_task(task, open_subject("builtin:tiny", "cpu")[1], trained_on=training_rows(str(run))).details["clean"]
    assert (clean["training_rows"], clean["rows"]) == (10, 30)
    assert [hit["where"] for hit in clean["leaked"]] == [f"new.jsonl:{n}" for n in range(1, 11)]
