"""What a kept result is found by: everything that decides a model's answers, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcli.evaluation.fingerprint import fingerprint
from ftcli.models.locate import model_folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shutil.copytree(model_folder("builtin:tiny"), tmp_path / "base")
    return tmp_path / "base"


def a_run(folder: Path, base: Path, kind: str = "adapter") -> Path:
    """A run as far as names go."""
    method = {"kind": "lora"} if kind == "adapter" else {"kind": "full"}
    train = {"steps": 1, "global_batch_size": 1}
    data = {"train": [{"source": {"kind": "file", "path": str(folder / "train.jsonl")}}]}
    run = folder / "run"
    (run / kind).mkdir(parents=True)
    recipe = {"version": 1, "name": "run", "model": {"base": str(base)}, "data": data, "method": method, "train": train}
    (run / "recipe.resolved.yaml").write_text(json.dumps(recipe))
    (run / kind / ("adapter_config.json" if kind == "adapter" else "config.json")).write_text(
        json.dumps({"base_model_name_or_path": str(base)})
    )
    (run / kind / "tokenizer.json").write_text("{}")
    (run / kind / f"{kind}_model.safetensors").write_bytes(b"")
    return run


def scale_a_tensor(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = (weights[name].to(torch.float32) * 1.5).to(weights[name].dtype)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("place", ["run", "run/adapter", "alone"])
def test_an_adapter_is_another_on_another_base(place: str, base: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path, base)
    shutil.copytree(run / "adapter", tmp_path / "alone")
    before = fingerprint(str(tmp_path / place))
    assert before is not None
    assert before == fingerprint(str(tmp_path / place))
    scale_a_tensor(base)
    assert fingerprint(str(tmp_path / place)) != before


def test_a_checkpoint_stands_on_its_base_and_its_recipe(base: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path, base)
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    before = fingerprint(str(checkpoint))
    text = (run / "recipe.resolved.yaml").read_text()
    (run / "recipe.resolved.yaml").write_text(text.replace('"lora"', '"lora", "rank": 3'))
    after = fingerprint(str(checkpoint))
    scale_a_tensor(base)
    assert len({before, after, fingerprint(str(checkpoint)), None}) == 4


def test_a_whole_model_needs_its_base_no_more(base: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path, base, "model")
    before = fingerprint(str(run))
    shutil.rmtree(base)
    (run / "metrics.jsonl").write_text("{}")
    assert before is not None
    assert fingerprint(str(run)) == before


def test_nothing_is_kept_without_the_base(base: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path, base)
    shutil.rmtree(base)
    assert fingerprint(str(run)) is None


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.model", "vocab.json", "chat_template.jinja", "modeling_own.py", "q.tiktoken"])
def test_every_file_that_changes_an_answer_counts(name: str, base: Path) -> None:
    before = fingerprint(str(base))
    (base / name).write_text("a")
    between = fingerprint(str(base))
    (base / name).write_text("b")
    assert len({before, between, fingerprint(str(base))}) == 3
