"""What a run does beside training: stops early, refuses to go on with nonsense, says what failed, leaves its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcli.cli.main import run

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Six steps of a tiny model on orders, evaluated every two."""
    document: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"init": {"architecture": "llama", "config": TINY}, "tokenizer": "builtin:tiny"},
        "data": {
            "train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 24}],
            "evaluation": [{"name": "held-out", "source": {"kind": "builtin", "name": "orders", "split": "test"}, "limit": 6}],
            "max_length": 256,
        },
        "method": {"kind": "full"},
        "train": {"steps": 6, "global_batch_size": 4, "lr": 1e-2},
        "every": {"log": 1, "evaluate": 2, "save": 2},
        "output": str(folder / "run"),
    }
    for path, value in changes.items():
        *keys, last = path.split("__")
        inner = document
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = value
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(document))
    return recipe


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_run_folder_holds_what_it_promises(tmp_path: Path) -> None:
    assert run(["train", str(write_recipe(tmp_path))]) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    promised = {"recipe.yaml", "recipe.resolved.yaml", "manifest.json", "metrics.jsonl", "checkpoints", "model", "loss.svg", "report.html"}
    assert promised | {"README.md"} <= names
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert {proof["name"] for proof in manifest["proofs"]} >= {"layout", "frozen weights", "saved = trained"}
    assert [record["step"] for record in records(tmp_path, "evaluate")] == [0, 2, 4, 6]
    assert not list((tmp_path / "run").rglob(".partial-*"))


def test_only_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    assert run(["train", str(write_recipe(tmp_path, every__keep=1, train__lr=1e-2))]) == 0
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert kept == {best["folder"], "step-000006"}


def test_early_stopping_ends_the_run_and_takes_the_best_weights(tmp_path: Path) -> None:
    # A rate far too high: no later evaluation beats the first.
    sgd = {"train__optimizer": {"kind": "sgd"}, "train__max_grad_norm": None}
    path = write_recipe(tmp_path, **sgd, train__lr=3.0, train__steps=40, train__early_stopping={"patience": 2})
    assert run(["train", str(path)]) == 0
    evaluations = records(tmp_path, "evaluate")
    losses = {record["step"]: record["sources"]["held-out"]["loss"] for record in evaluations if record["step"] > 0}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["steps"] < 40
    assert losses[manifest["best_step"]] == min(losses.values())
    # the result is measured again, and is the best step's
    assert evaluations[-1]["step"] == manifest["best_step"]
    assert evaluations[-1]["sources"]["held-out"]["loss"] == pytest.approx(min(losses.values()), abs=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sgd = {"train__optimizer": {"kind": "sgd"}, "train__max_grad_norm": None}
    path = write_recipe(tmp_path, **sgd, train__lr=1e30, train__schedule={"kind": "constant"})
    assert run(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert "the update was not made" in error
    assert "orders row" in error
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()])
def test_out_of_memory_says_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    from ftcli.layout.model import TreeModel

    path = write_recipe(tmp_path)
    original = TreeModel.forward

    def forward(self: TreeModel, batch: Any) -> torch.Tensor:
        if self.training:
            raise error
        return original(self, batch)

    monkeypatch.setattr(TreeModel, "forward", forward)
    assert run(["train", str(path)]) == 1
    assert "micro_batch_tokens" in capsys.readouterr().err


def test_a_run_that_cannot_fit_on_the_disk_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftcli.training.resources.free_disk_bytes", lambda path: 1000)
    assert run(["train", str(write_recipe(tmp_path))]) == 2
    assert "1000 B are free" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_runs_cannot_train_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ftcli.training.folder import RunFolder

    with RunFolder(tmp_path / "run").locked():
        assert run(["train", str(write_recipe(tmp_path))]) == 2
    assert "another process is training" in capsys.readouterr().err


def test_what_a_killed_beginning_left_is_no_strangers(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("version: 1")
    assert run(["train", str(write_recipe(tmp_path))]) == 0


def test_a_damaged_checkpoint_is_named_and_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path)
    assert run(["train", str(path)]) == 0
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "summary"}))
    weights = tmp_path / "run" / "checkpoints" / "step-000006" / "trainable.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    capsys.readouterr()
    assert run(["train", str(path), "--resume"]) == 1
    assert "step-000006 is damaged: trainable.safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_training_gives_the_losses_of_plain_training(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        assert run(["train", str(write_recipe(folder, train__compile=compiled))]) == 0
        losses.append([record["loss"] for record in records(folder, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bf16_and_gradient_checkpointing_train(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train__mixed_precision="bf16", train__gradient_checkpointing=True)
    assert run(["train", str(path)]) == 0
    losses = [record["loss"] for record in records(tmp_path, "train")]
    assert losses[-1] < losses[0]


def test_examples_longer_than_the_models_context_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, model__init={"architecture": "llama", "config": {**TINY, "max_position_embeddings": 64}})
    assert run(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert "the model sees 64 at once" in error
    assert "`max_length: 64`" in error


def test_prompts_that_leave_no_room_are_left_out_of_the_generated_answers(tmp_path: Path) -> None:
    """A context as long as the longest kept example: its prompt may fill it, and a run must not fail for that at its end."""
    generate = {"metrics": [{"kind": "exact-match"}], "max_new_tokens": 4}
    path = write_recipe(
        tmp_path,
        model__init={"architecture": "llama", "config": {**TINY, "max_position_embeddings": 60}},
        data__max_length=60,
        data__on_overflow="truncate_prompt",
        data__evaluation=[
            {"name": "held-out", "source": {"kind": "builtin", "name": "orders", "split": "test"}, "limit": 6, "generate": generate}
        ],
    )
    assert run(["train", str(path)]) == 0
    assert "exact-match" in records(tmp_path, "evaluate")[-1]["sources"]["held-out"]
