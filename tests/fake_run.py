"""A run folder as a finished run leaves it, without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

RECIPE = """version: 1
name: NAME
model: {base: "builtin:tiny"}
data:
  train:
    - {source: {kind: builtin, name: orders}, format: {kind: chat}, name: orders}
    - {source: {kind: builtin, name: stories}, format: {kind: text}, name: stories, role: replay}
  evaluation:
    - {name: orders, source: {kind: builtin, name: orders, split: test}, format: {kind: chat}}
method: {kind: lora, rank: 8}
train: {steps: 40, lr: LR, seed: 17}
"""

PROOFS = [
    {"name": "saved = trained", "passed": True, "detail": "largest difference 0.0e+00 nats over 120 tokens"},
    {"name": "generation stops", "passed": False, "detail": "7 of 8 answers end within 64 tokens"},
]


def source_values(loss: float, role: str, **metrics: float) -> dict[str, Any]:
    """One source of an evaluation record."""
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2, "targets": 4000, "role": role, **metrics}


def evaluation(step: int, orders: float, stories: float, match: float) -> dict[str, Any]:
    sources = {"orders": source_values(orders, "target", **{"exact-match": match}), "stories": source_values(stories, "retained")}
    return {"kind": "evaluate", "step": step, "sources": sources}


def train_record(step: int, num_steps: int = 40) -> dict[str, Any]:
    loss = 2.0 * math.exp(-3 * step / num_steps)
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "lr": 2e-4 * (1 - step / num_steps),
        "grad_norm": 1.0,
        "target_tokens_per_second": 1234.5,
        "tokens": 4000 * step,
        "targets": 1000 * step,
        "sources": {"orders": loss, "stories": 1.3},
        "batch_hash": "ab12",
        "seconds": 0.5 * step,
    }


def data_report(name: str, kind: str, **changes: Any) -> dict[str, Any]:
    counts = {"rows_read": 2000, "num_examples": 1990, "num_tokens": 123456, "num_targets": 45678, "num_bytes": 100000}
    lengths = {"length_p50": 61, "length_p95": 100, "length_max": 181, "num_overlong": 0, "overlong": [], "num_without_stop": 0}
    ends = {"first_target": "{", "last_target": "<|im_end|>", "cache_key": "abc", "cache_hit": False, "dropped": {"empty answer": 10}}
    return {"name": name, "format": kind, "on_overflow": "error", **counts, **lengths, **ends, **changes}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_fake_run(path: Path, *, status: str = "finished", lr: str = "2e-4", num_logged: int = 40, **manifest: Any) -> Path:
    """Write everything a finished run of 40 steps leaves, but for its weights."""
    path.mkdir(parents=True)
    values: dict[str, Any] = {
        "status": status,
        "name": path.name,
        "method": "lora",
        "base": "builtin:tiny",
        "artefact": "adapter",
        "num_steps": 40,
        "steps": num_logged,
        "seed": 17,
        "lr": 2e-4,
        "parameters": {"trainable": 1000, "total": 3000},
        "layout": {"layout": "forest", "reason": "equal to rows on the probe", "log_prob_difference": 1e-6, "gradient_difference": 1e-6},
        "hashes": {"tokenizer": "cd" * 32},
        "environment": {"versions": {"ftcli": "0.1.0", "torch": "2.13.0", "mlflow": None}, "device": "cpu", "num_processes": 1},
        "data": [data_report("orders", "chat"), data_report("stories", "text", dropped={})],
        "proofs": PROOFS,
        "seconds": 61.2,
    }
    (path / "manifest.json").write_text(json.dumps({**values, **manifest}), encoding="utf-8")
    records = [evaluation(0, 2.4, 1.31, 0.02), *(train_record(step) for step in range(1, num_logged + 1)), evaluation(40, 0.2, 1.36, 0.92)]
    write_lines(path / "metrics.jsonl", records)
    (path / "recipe.resolved.yaml").write_text(RECIPE.replace("NAME", path.name).replace("LR", lr), encoding="utf-8")
    sample = {"source": "orders", "where": "test:1", "prompt": "two <teas>", "reference": '{"tea": 2}'}
    write_lines(path / "samples.jsonl", [{"step": 0, **sample, "answer": "Once"}, {"step": 40, **sample, "answer": '{"tea": 2}'}])
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    return path
