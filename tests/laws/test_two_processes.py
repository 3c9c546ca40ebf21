"""Law 1 across processes: two processes over gloo make the update that one makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT

RECIPE = {
    "version": 1,
    "name": "two",
    "model": {"init": {"architecture": "llama", "config": {}}, "tokenizer": "builtin:tiny", "dtype": "float32"},
    "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 40}], "max_length": 256},
    "method": {"kind": "full"},
    "train": {
        "steps": 3,
        "global_batch_size": 5,
        "micro_batch_tokens": 200,
        "lr": 0.5,
        "max_grad_norm": None,
        "optimizer": {"kind": "sgd"},
        "schedule": {"kind": "constant"},
    },
}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


HOLDING = {
    "data": {
        "train": [
            {"source": {"kind": "builtin", "name": "orders"}, "limit": 20},
            {"name": "old", "source": {"kind": "builtin", "name": "orders", "split": "test"}, "limit": 20, "role": "replay", "weight": 0.5},
        ],
        "max_length": 256,
    },
    "objective": {
        "kind": "causal-lm",
        "regularize": [
            {"kind": "kl", "weight": 0.5, "on": "replay"},
            {"kind": "kl", "cache": {"top_k": 8}},
            {"kind": "l2_sp", "weight": 0.2},
            {"kind": "ewc", "weight": 2.0, "examples": 4},
        ],
    },
}


def trained(folder: Path, num_processes: int, layout: str = "auto", **changes: Any) -> dict[str, torch.Tensor]:
    """The weights after the recipe, run by so many processes."""
    recipe = {**RECIPE, **changes, "output": str(folder / f"run-{num_processes}"), "train": {**RECIPE["train"], "layout": layout}}
    recipe["model"] = {**RECIPE["model"], "init": {"architecture": "llama", "config": TINY}}
    path = folder / f"recipe-{num_processes}.yaml"
    path.write_text(json.dumps(recipe))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--master_port", str(free_port())]
    command = [*(launcher if num_processes > 1 else [sys.executable]), "-m", "ftcli.cli.main", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(folder / f"run-{num_processes}" / "model" / "model.safetensors")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("layouts", [("forest", "forest"), ("forest", "rows")], ids=["forest", "rows"])
def test_two_processes_make_the_update_of_one(tmp_path: Path, layouts: tuple[str, str]) -> None:
    alone, together = trained(tmp_path, 1, layouts[0]), trained(tmp_path, 2, layouts[1])
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-6
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / f"run-{n}" / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
        for n in (1, 2)
    ]
    assert losses[0]
    assert all(abs(a - b) < 1e-5 for a, b in zip(*losses, strict=True))


def test_two_processes_are_held_as_one_is(tmp_path: Path) -> None:
    alone, together = trained(tmp_path, 1, "forest", **HOLDING), trained(tmp_path, 2, "rows", **HOLDING)
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-6
    lines = [(tmp_path / f"run-{n}" / "metrics.jsonl").read_text().splitlines() for n in (1, 2)]
    first, second = (json.loads(next(line for line in reversed(part) if '"train"' in line))["regularizers"] for part in lines)
    assert min(first.values()) > 0
    assert all(abs(first[name] - second[name]) < 1e-6 for name in first)
