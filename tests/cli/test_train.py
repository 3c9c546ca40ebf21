"""`ftcli train` as a user meets it: what goes where, what --set, --resume, --smoke and --json do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

from ftcli.builtin.catalogue import model_folder
from ftcli.cli.main import run

RECIPE = """version: 1
name: tiny
model: {init: {architecture: llama, config: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}}, \
tokenizer: "builtin:tiny"}
data:
  train:
    - {source: {kind: builtin, name: orders}, limit: 24}
  max_length: 256
method: {kind: METHOD}
train: {steps: 2, global_batch_size: 4, device: cpu}
"""
# What libraries print when nobody stops them: warnings, progress bars, advice.
NOISE = re.compile(r"warn|\d+%\||it/s|kernels|deprecat|trust_remote|\bINFO\b", re.IGNORECASE)


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_recipe(text: str) -> str:
    Path("tiny.yaml").write_text(text)
    return "tiny.yaml"


def test_json_is_alone_on_stdout_and_libraries_say_nothing(tmp_path: Path) -> None:
    """In a process of its own: what a library has to say, it says when it is imported."""
    path = write_recipe(RECIPE.replace("METHOD", "qlora, rank: 2"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "ftcli.cli.main", "train", path, "--set", "train.steps=3", "--set", "train.lr=1e-3", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["status"], summary["steps"], summary["artefact"]) == ("finished", 3, "adapter")
    assert all(proof["passed"] for proof in summary["proofs"] if proof["name"] != "generation stops")
    assert "step 3/3" in done.stderr
    assert "passed  frozen weights" in done.stderr
    assert not [line for line in done.stderr.splitlines() if NOISE.search(line)]
    folder = tmp_path / "runs" / "tiny"
    assert "lr: 0.001" in (folder / "recipe.resolved.yaml").read_text()
    assert (folder / "recipe.yaml").read_text() == (tmp_path / path).read_text()


def test_a_finished_run_is_not_trained_again(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(RECIPE.replace("METHOD", "full"))
    assert run(["train", path]) == 0
    assert "finished after 2 steps" in capsys.readouterr().out
    folder = Path("runs/tiny")
    first_line = (folder / "recipe.resolved.yaml").read_text().splitlines()[0]
    schema = json.loads((folder / first_line.removeprefix("# yaml-language-server: $schema=")).read_text())
    assert schema["title"] == "ftcli recipe"

    kept = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert run(["train", path, "--resume"]) == 0
    assert capsys.readouterr().out == "tiny is finished: nothing is left to do\n"
    assert run(["train", path, "--resume", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["status"] == "finished"
    assert captured.err == "tiny is finished: nothing is left to do\n"
    assert run(["train", path]) == 2
    assert "already holds a run (status: finished)\n  hint: --resume goes on with it" in capsys.readouterr().err
    assert run(["train", path, "--resume", "--set", "train.steps=4"]) == 2
    assert "the recipe has changed\n  hint: undo the change, or give another `name` or `output`\n\n  train.steps: 2 -> 4" in (
        capsys.readouterr().err
    )
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == kept


def test_a_run_folder_that_cannot_be_made_is_said_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(RECIPE.replace("METHOD", "full"))
    assert run(["train", path, "--set", "output=tiny.yaml/run"]) == 2
    words = capsys.readouterr().err
    assert f"error: the run folder {Path.cwd()}/tiny.yaml/run cannot be made: {Path.cwd()}/tiny.yaml is a file" in words


@pytest.mark.parametrize("method", ["full", "lora, rank: 2", "qlora, rank: 2", "prompt, prompt_length: 4", "adapter"])
def test_a_smoke_run_trains_resumes_merges_and_leaves_nothing(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(RECIPE.replace("METHOD", method))
    assert run(["train", path, "--smoke"]) == 0
    captured = capsys.readouterr()
    assert "finished after 4 steps" in captured.out
    assert "resumed from the checkpoint of step 4, and proven again" in captured.out
    # a soft prompt and a bottleneck have no plain weights that compute the same
    assert ("merged = attached: KL" in captured.out) == ("lora" in method)
    assert captured.out.endswith("ok: the smoke run of tiny.yaml went through; its folder is removed\n")
    assert not NOISE.search(captured.err)
    assert sorted(file.name for file in Path().rglob("*")) == ["runs", "tiny.yaml"]


def test_a_smoke_run_of_a_base_on_the_hub_takes_a_tiny_model_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are never fetched: the hub's cache holds the configuration and the tokenizer only."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stored = tmp_path / "hub" / "models--ada--large"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text("0" * 40)
    snapshot = stored / "snapshots" / ("0" * 40)
    shutil.copytree(model_folder("tiny"), snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 6144}
    (snapshot / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **sizes}))

    text = re.sub(r"model: .*", "model: {base: ada/large, revision: main}", RECIPE)
    # None of these fits four steps of a model with 64 features as it stands.
    text = text.replace("METHOD", "lora, rank: 256, init: pissa, rank_pattern: {v_proj: 512}")
    text = text.replace("steps: 2,", "epochs: 3, schedule: {kind: cosine, warmup_steps: 100},")
    assert run(["train", write_recipe(text), "--smoke"]) == 0
    out = capsys.readouterr().out
    assert "a tiny qwen3 with random weights stands in for ada/large" in out
    assert "went through" in out
