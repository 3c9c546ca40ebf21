"""ftcli against TRL's SFTTrainer: same model, data, masks, method, batch, steps and final loss; speed and memory, interleaved.

    python scripts/bench/train_vs_trl.py --peer-python PEER/bin/python

runs every side in a process of its own, one after the other (A B C, A B C, ...), so that a disturbance hits all of them, and
reports medians, and medians of the ratios within a round. `--peer-python` is a Python with torch, transformers, peft,
bitsandbytes and datasets of the same versions, and trl. Rates and processor seconds are of the steps after the warm-up; peak
memory is of the whole process. A round in which the sides did not see the same tokens and targets, or do not end at the same
loss (within 1 %), is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from inputs import SHARED, Setting, make_model, write_chats

HERE = Path(__file__).resolve().parent
SAME_LOSS = 0.01
LEARNING_RATES = {"lora": 1e-3, "qlora": 1e-3, "full": 3e-4}


@dataclass(frozen=True)
class Side:
    """One way to do the same training."""

    name: str
    is_peer: bool
    changes: dict[str, Any]
    """What differs from the worker's own settings: of the recipe's `train`, or of SFTConfig."""


# Eight forward passes of one example each: no padding, and TRL's largest buffers stay small.
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
FTCLI = Side("ftcli", False, {})
TRL = Side("trl", True, {})
TRL_ONE_BY_ONE = Side("trl one by one", True, ONE_BY_ONE)
EXTRA_SIDES = (
    Side("trl padding-free", True, {"padding_free": True, "max_length": None}),
    Side("trl recomputing (its default)", True, {"gradient_checkpointing": True}),
    Side("ftcli bf16", False, {"mixed_precision": "bf16"}),
    Side("trl bf16 (its default)", True, {"bf16": True}),
)


def measure(side: Side, setting_path: Path, python: str) -> dict[str, Any]:
    """The worker's result; exits with its words where it fails."""
    setting = Setting.read(setting_path)
    worker = HERE / ("trl_worker.py" if side.is_peer else "ftcli_worker.py")
    environment = os.environ | {
        "OMP_NUM_THREADS": str(setting.threads),
        "MKL_NUM_THREADS": str(setting.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FTCLI_CACHE": str(setting_path.parent / "cache"),
    }
    command = [python if side.is_peer else sys.executable, str(worker), str(setting_path), json.dumps(side.changes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not lines:
        raise SystemExit(f"{side.name} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def check_same(results: dict[str, dict[str, Any]], sides: list[Side]) -> None:
    """Exit unless all sides of a round did the same work."""
    first = results[sides[0].name]
    for side in sides[1:]:
        other = results[side.name]
        for key in ("tokens", "targets"):
            if first[key] != other[key]:
                raise SystemExit(f"{sides[0].name} saw {first[key]} {key}, {side.name} {other[key]}")
        difference = abs(other["losses"][-1] / first["losses"][-1] - 1)
        if difference > SAME_LOSS:
            raise SystemExit(f"{side.name} ends at a loss of {other['losses'][-1]}, {sides[0].name} at {first['losses'][-1]}")


def table(method: str, sides: list[Side], rounds: list[dict[str, dict[str, Any]]]) -> list[str]:
    """Markdown rows: medians of each side, and the medians of its ratios to the first side."""
    rows = []
    for side in sides:
        runs = [results[side.name] for results in rounds]
        firsts = [results[sides[0].name] for results in rounds]
        pairs = list(zip(firsts, runs, strict=True))
        cells = [
            method,
            side.name,
            f"{median(run['targets'] / run['seconds'] for run in runs):.0f}",
            f"{median(run['tokens'] / run['seconds'] for run in runs):.0f}",
            f"{median(run['tokens'] / run['processor_seconds'] for run in runs):.0f}",
            f"{median(run['peak_bytes'] for run in runs) / 1e9:.2f}",
            f"{median(run['losses'][-1] for run in runs):.4f}",
            f"{median(run['seconds'] / first['seconds'] for first, run in pairs):.2f}",
            f"{median(run['processor_seconds'] / first['processor_seconds'] for first, run in pairs):.2f}",
            f"{median(first['peak_bytes'] / run['peak_bytes'] for first, run in pairs):.2f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


HEADER = [
    "| method | side | targets/s | tokens/s | tokens per CPU-second | peak GB | final loss "
    "| ftcli faster by | less CPU by | ftcli's share of its peak |",
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
]


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="Python of an environment with TRL")
    parser.add_argument("--methods", nargs="+", default=["lora", "full", "qlora"], choices=["lora", "full", "qlora"])
    parser.add_argument("--extra", action="store_true", help="also other ways to set up TRL, and bfloat16 on both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=SHARED / "data" / "gsm8k_train.jsonl", help="chats, one JSON object a line")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "data" / "tokenizers" / "mistral-v3")
    parser.add_argument("--json", type=Path, help="write every single measurement there")
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    sides = [FTCLI, TRL, TRL_ONE_BY_ONE, *(EXTRA_SIDES if arguments.extra else ())]
    measured: dict[str, list[dict[str, dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory(prefix="ftcli-bench-") as name:
        folder = Path(name)
        make_model(folder, arguments.tokenizer)
        for method in arguments.methods:
            setting = Setting(method, arguments.steps, arguments.warm_up, arguments.threads, LEARNING_RATES[method])
            path = setting.write(folder)
            write_chats(folder, arguments.rows, setting)
            measured[method] = []
            for number in range(1, arguments.rounds + 1):
                results = {}
                for side in sides:
                    results[side.name] = measure(side, path, arguments.peer_python)
                    seconds = results[side.name]["seconds"]
                    print(f"{method} round {number}/{arguments.rounds}: {side.name} {seconds:.1f} s", file=sys.stderr, flush=True)
                check_same(results, sides)
                measured[method].append(results)
    print("\n".join(HEADER + [row for method, rounds in measured.items() for row in table(method, sides, rounds)]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
