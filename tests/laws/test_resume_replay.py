"""Law 3 in a schedule of replay: resumed = uninterrupted, bit for bit, after a signal and after kill -9."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli.main import run
from tests.laws.test_resume import assert_same, process
from tests.laws.test_resume import recipe as mixed_recipe


def recipe(folder: Path, name: str) -> Path:
    """The recipe of law 3, with the share of new tokens rising over its steps and the replayed texts in two sources."""
    path = mixed_recipe(folder, name)
    document = json.loads(path.read_text())
    new, stories = document["data"]["train"]
    clinic = {"source": {"kind": "builtin", "name": "clinic"}, "limit": 20, "role": "replay"}
    document["data"]["train"] = [{**new, "weight": 1.0}, {**stories, "weight": 1.0}, clinic]
    document["data"]["mixture"] = {"kind": "replay", "share_of_new": {"from": 0.25, "to": 0.8, "shape": "linear"}}
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    assert run(["train", str(recipe(folder, "whole"))]) == 0
    return folder


def test_a_run_stopped_inside_the_schedule_resumes_bitwise(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.training.hooks import Checkpoint

    path = recipe(whole, "parts")
    original = Checkpoint.after_step
    for stop_after in (3, 9):

        def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any, stop_after: int = stop_after) -> None:
            if progress.step == stop_after:
                self.stop.handle(signal.SIGTERM, None)
            original(self, progress, batches, result)

        monkeypatch.setattr(Checkpoint, "after_step", after_step)
        assert run(["train", str(path), "--resume"]) == 75
    monkeypatch.setattr(Checkpoint, "after_step", original)
    assert run(["train", str(path), "--resume"]) == 0
    assert_same(whole / "parts", whole / "whole")
    mixtures = [json.loads((whole / name / "manifest.json").read_text())["mixture"] for name in ("parts", "whole")]
    assert mixtures[0] == mixtures[1]
    assert sum(entry["share"] for entry in mixtures[0]) == pytest.approx(1.0)


@pytest.mark.slow
def test_killed_inside_the_schedule_it_resumes_bitwise(whole: Path) -> None:
    path = recipe(whole, "killed")
    metrics = whole / "killed" / "metrics.jsonl"
    for after_step in (1, 6, 9):
        child = process(path, "--resume")
        deadline = time.monotonic() + 120
        while not (metrics.exists() and f'"train", "step": {after_step}' in metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        child.kill()
        child.wait()
    last = process(path, "--resume")
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output.decode()
    assert_same(whole / "killed", whole / "whole")
