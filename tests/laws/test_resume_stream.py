"""Law 3 while the source is still being tokenised: resumed = uninterrupted = trained on what was tokenised before, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli.main import run
from tests.laws.test_resume import assert_same, process
from tests.laws.test_resume import recipe as mixed_recipe

WORDS = ("a", "the", "fox", "dog", "cat", "crow", "sees", "finds", "takes", "follows", "an", "old", "stone", "road", "river", "house")


def recipe(folder: Path, name: str, num_rows: int, window: int) -> Path:
    """The recipe of law 3 with its two sources as a stream, of which the second is replay."""
    texts = folder / "texts.jsonl"
    if not texts.exists():
        generator = random.Random(1)
        lines = [{"text": " ".join(generator.choices(WORDS, k=generator.randint(40, 120)))} for _ in range(num_rows)]
        texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = mixed_recipe(folder, name)
    document = json.loads(path.read_text())
    stories = document["data"]["train"][1]
    document["data"]["train"] = [{"source": {"kind": "file", "path": str(texts)}, "format": {"kind": "text"}, "unit": "block"}, stories]
    document["data"] |= {"mixture": {"kind": "stream", "window": window}, "workers": 1}
    path.write_text(json.dumps(document))
    return path


def trees_of(cache: Path) -> list[str]:
    """The stores of a cache, complete or not."""
    return sorted(path.name for path in (cache / "trees").iterdir() if path.is_dir())


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_run_stopped_while_its_source_is_tokenised_resumes_bitwise(
    tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftcli.data import chunks, prepare
    from ftcli.data.sources.file import File
    from ftcli.training.hooks import Checkpoint

    monkeypatch.setattr(chunks, "CHUNK_ROWS", 10)
    monkeypatch.setattr(prepare, "MIN_ARRIVED", 1)
    rows, after_step = File.rows, Checkpoint.after_step
    allowed, stop_after = [40], [4]

    def slow_rows(self: File) -> Iterator[Any]:
        """Where it is tokenised in a thread, ten rows more with every step."""
        for number, row in enumerate(rows(self)):
            deadline = time.monotonic() + 30
            while threading.current_thread().name == "tokenise texts" and number >= allowed[0]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield row

    def step_done(self: Checkpoint, progress: Any, batches: Any, result: Any) -> None:
        allowed[0] += 10
        if progress.is_last or progress.step == stop_after[0]:
            # The rest of a chunk, so that the thread sees that it is to stop.
            allowed[0] += 20
        if progress.step == stop_after[0]:
            self.stop.handle(signal.SIGTERM, None)
        after_step(self, progress, batches, result)

    monkeypatch.setattr(File, "rows", slow_rows)
    monkeypatch.setattr(Checkpoint, "after_step", step_done)
    path = recipe(tmp_path, "parts", num_rows=400, window=8)
    assert run(["train", str(path)]) == 75
    assert any(name.endswith(".partial") for name in trees_of(fresh_cache))
    allowed[0], stop_after[0] = 100, 0
    assert run(["train", str(path), "--resume"]) == 0
    assert any(name.endswith(".partial") for name in trees_of(fresh_cache)), "nothing was still to be tokenised"
    allowed[0] = 10**9
    assert run(["check", str(path)]) == 0
    assert not any(name.endswith(".partial") for name in trees_of(fresh_cache))
    assert run(["train", str(recipe(tmp_path, "whole", num_rows=400, window=8))]) == 0
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_killed_while_its_source_is_tokenised_it_resumes_bitwise(tmp_path: Path, fresh_cache: Path) -> None:
    path = recipe(tmp_path, "killed", num_rows=400_000, window=3000)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    were_tokenising = []
    for after_step in (1, 6):
        child = process(path, "--resume")
        deadline = time.monotonic() + 240
        while not (metrics.exists() and f'"train", "step": {after_step}' in metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        child.kill()
        child.wait()
        were_tokenising.append(any(name.endswith(".partial") for name in trees_of(fresh_cache)))
    # a quick machine may be done with it before the second kill
    assert were_tokenising[0], "tokenising was over before the run was killed"
    last = process(path, "--resume")
    output, _ = last.communicate(timeout=400)
    assert last.returncode == 0, output.decode()
    shutil.rmtree(fresh_cache)
    assert run(["check", str(path)]) == 0
    assert run(["train", str(recipe(tmp_path, "whole", num_rows=0, window=3000))]) == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")
