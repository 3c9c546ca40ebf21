"""Branches: a run that continues from a checkpoint of another is the run that was never cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftcli.cli.main import run

LENGTHS = {"kind": "infinite", "warmup_steps": 1, "cooldown_steps": 2}


def recipe(folder: Path, name: str, steps: int, anneal_steps: int, **changes: Any) -> str:
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "attention_dropout": 0.1}
    document = {
        "version": 1,
        "name": name,
        "model": {"init": {"architecture": "llama", "config": config}, "tokenizer": "builtin:tiny"},
        "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 20}], "max_length": 256},
        "method": {"kind": "full"},
        "train": {"steps": steps, "global_batch_size": 3, "lr": 1e-2, "schedule": {**LENGTHS, "anneal_steps": anneal_steps}},
        "every": {"log": 2, "save": 5, "keep": 9},
        "output": str(folder / name),
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return str(path)


def records(folder: Path, first: int) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = {"seconds", "target_tokens_per_second", "memory_bytes"}
    return [{k: v for k, v in line.items() if k not in own} for line in lines if line["kind"] == "train" and line["step"] >= first]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never anneals, with a checkpoint in its constant part."""
    folder = tmp_path_factory.mktemp("branch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTCLI_CACHE", str(folder / "cache"))
        assert run(["train", recipe(folder, "trunk", 10, 0)]) == 0
    return folder


def test_a_branch_is_the_run_that_was_never_cut(trunk: Path) -> None:
    assert run(["train", recipe(trunk, "whole", 8, 3)]) == 0
    init_from = {"path": str(trunk / "trunk" / "checkpoints" / "step-000005"), "continues": True}
    assert run(["train", recipe(trunk, "branch", 8, 3, init_from=init_from)]) == 0
    expected, found = (load_file(trunk / name / "model" / "model.safetensors") for name in ("whole", "branch"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert records(trunk / "branch", 6) == records(trunk / "whole", 6)
    assert [record["step"] for record in records(trunk / "branch", 0)] == [6, 8]


@pytest.mark.parametrize(
    ("path", "steps", "words"),
    [("trunk", 12, "is no checkpoint"), ("trunk/checkpoints/step-000005", 5, "is at step 5, and the run ends at step 5")],
)
def test_a_branch_that_cannot_be_is_refused(trunk: Path, path: str, steps: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    init_from = {"path": str(trunk / path), "continues": True}
    assert run(["train", recipe(trunk, f"refused-{steps}", steps, 0, init_from=init_from)]) == 2
    assert words in capsys.readouterr().err


def test_an_anneal_longer_than_the_branch_begins_where_the_branch_begins(trunk: Path) -> None:
    init_from = {"path": str(trunk / "trunk" / "checkpoints" / "step-000005"), "continues": True}
    assert run(["train", recipe(trunk, "long-anneal", 8, 30, init_from=init_from)]) == 0
    # of 0.55 in the constant part down to 0.1, by the same factor at each of three steps
    assert [record["lr"] for record in records(trunk / "long-anneal", 0)] == pytest.approx([1e-2 * 0.55 * (0.1 / 0.55) ** (1 / 3), 1e-3])
    assert run(["train", recipe(trunk, "as-long", 8, 3, init_from=init_from)]) == 0
    expected, found = (load_file(trunk / name / "model" / "model.safetensors") for name in ("as-long", "long-anneal"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
