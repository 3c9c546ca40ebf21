"""Law 3: resumed = uninterrupted, bit for bit, across an epoch boundary, in a mixture, right after a save, and after kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftcli.cli.main import run
from tests.conftest import ROOT
from tests.laws.test_two_processes import TINY

STEPS = 14


def recipe(folder: Path, name: str, **train: Any) -> Path:
    """Two sources in a mixture, dropout, several epochs of the small one, evaluations, a checkpoint every four steps."""
    document = {
        "version": 1,
        "name": name,
        "model": {"init": {"architecture": "llama", "config": {**TINY, "attention_dropout": 0.1}}, "tokenizer": "builtin:tiny"},
        "data": {
            "train": [
                {"source": {"kind": "builtin", "name": "orders"}, "limit": 11, "weight": 0.7},
                {"source": {"kind": "builtin", "name": "stories"}, "limit": 30, "weight": 0.3, "role": "replay"},
            ],
            "evaluation": [{"source": {"kind": "builtin", "name": "orders", "split": "test"}, "limit": 5}],
            "mixture": {"kind": "shares", "unit": "tokens"},
            "max_length": 128,
        },
        "method": {"kind": "full"},
        "train": {"steps": STEPS, "global_batch_size": 5, "lr": 1e-2, "micro_batch_tokens": 300, **train},
        "every": {"log": 3, "evaluate": 5, "save": 4},
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return path


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The weights, and the metrics without their times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = {"seconds", "target_tokens_per_second", "memory_bytes"}
    return load_file(folder / "model" / "model.safetensors"), [{k: v for k, v in r.items() if k not in times} for r in records]


def assert_same(found: Path, expected: Path) -> None:
    weights, records = outcome(found)
    expected_weights, expected_records = outcome(expected)
    assert records == expected_records
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def process(path: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "ftcli.cli.main", "train", str(path), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(["train", str(recipe(folder, "whole"))]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops after each of three steps: one right after a save, one between saves, one at an evaluation."""
    from ftcli.training.hooks import Checkpoint

    whole = recipe(tmp_path, "whole", optimizer={"kind": optimizer})
    parts = recipe(tmp_path, "parts", optimizer={"kind": optimizer})
    assert run(["train", str(whole)]) == 0
    original = Checkpoint.after_step
    for stop_after in (4, 6, 10):

        def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any, stop_after: int = stop_after) -> None:
            if progress.step == stop_after:
                self.stop.handle(signal.SIGTERM, None)
            original(self, progress, batches, result)

        monkeypatch.setattr(Checkpoint, "after_step", after_step)
        assert run(["train", str(parts), "--resume"]) == 75
    monkeypatch.setattr(Checkpoint, "after_step", original)
    assert run(["train", str(parts), "--resume"]) == 0
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_resuming_with_another_recipe_is_refused_with_the_difference(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(uninterrupted / "whole.yaml"), "--resume", "--set", "train.lr=0.02"]) == 2
    assert "train.lr: 0.01 -> 0.02" in capsys.readouterr().err


def test_training_into_a_finished_run_is_refused(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(uninterrupted / "whole.yaml")]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_end(tmp_path: Path, uninterrupted: Path) -> None:
    """Kills at random moments of the whole life of the process, tokenising and writing checkpoints among them."""
    path = recipe(uninterrupted, "killed")
    generator = random.Random(11)
    for _ in range(20):
        child = process(path, "--resume")
        time.sleep(generator.uniform(0.5, 12))
        child.kill()
        child.wait()
    last = process(path, "--resume")
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output.decode()
    assert_same(uninterrupted / "killed", uninterrupted / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint_and_exit_code_75(uninterrupted: Path, number: signal.Signals) -> None:
    name = f"stopped-{number.name.lower()}"
    path = recipe(uninterrupted, name)
    document = json.loads(path.read_text())
    document["train"]["steps"] = 100_000
    path.write_text(json.dumps(document))
    child = process(path)
    metrics = uninterrupted / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"train"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(number)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 75, output.decode()
    assert f"stopped by {number.name}" in output.decode()
    assert sorted((uninterrupted / name / "checkpoints").glob("step-*"))
