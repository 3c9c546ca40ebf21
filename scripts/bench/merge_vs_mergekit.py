"""ftcli against mergekit: the same merges of the same files; processor time, wall time and peak memory, interleaved.

    python scripts/bench/merge_vs_mergekit.py --mergekit-python VENV/bin/python [--rounds 3] [--layers 12] [--hidden 1024]

The script makes a Llama of 168 M parameters (tied, bfloat16) and three fine-tunes of it. Every merge runs in a process of its own, one
tool after the other; what is counted is the whole process, start-up included, as somebody at a terminal pays for it. ftcli runs with
--no-verify, since mergekit verifies nothing. It hashes its inputs, which mergekit does not: the first time with these models, and again,
when it knows them by path, size, time and inode. A plain copy of as many bytes as are read
and written is timed beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

NAMES = ("a", "b", "c")
TOOLS = ("mergekit", "ftcli, first time", "ftcli, again")
_WEIGHTS = {"a": 0.4, "b": 0.35, "c": 0.25}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"per_model": {}, "models": NAMES, "base": False},
    "slerp": {"parameters": {"t": 0.4}, "models": ("base", "a"), "base": True},
    "task_arithmetic": {"per_model": {}, "models": NAMES, "base": True},
    "ties": {"per_model": {"density": 0.5}, "models": NAMES, "base": True},
    "dare_ties": {"per_model": {"density": 0.5}, "models": NAMES, "base": True},
    "della": {"per_model": {"density": 0.5, "epsilon": 0.1}, "models": NAMES, "base": True},
    "breadcrumbs": {"per_model": {"density": 0.5}, "models": NAMES, "base": True},
    "model_stock": {"models": NAMES, "base": True},
    "karcher": {"models": NAMES, "base": False},
}


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    wall_seconds: float
    processor_seconds: float
    peak_bytes: int


def write_recipe(folder: Path, method: str) -> Path:
    """The recipe of a method, read alike by both tools."""
    setting = METHODS[method]
    models = []
    for name in setting["models"]:
        own = {"weight": _WEIGHTS[name], **setting["per_model"]} if "per_model" in setting and name in _WEIGHTS else {}
        models.append({"model": str(folder / name), **({"parameters": own} if own else {})})
    document = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    document |= {"base_model": str(folder / "base")} if setting["base"] else {}
    document |= {"parameters": setting["parameters"]} if "parameters" in setting else {}
    path = folder / f"{method}.yaml"
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def make_models(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """`base` and three fine-tunes of it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for number, name in enumerate(NAMES):
        torch.manual_seed(number + 1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(start[key].float() + 0.002 * torch.randn(parameter.shape))
        model.save_pretrained(folder / name)


def run(command: list[str], folder: Path) -> Cost:
    """The cost of a process, its children included."""
    began = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FTCLI_CACHE": str(folder / "cache")}
        actions = [(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)]
        process = os.posix_spawn(command[0], command, environment, file_actions=actions)
        _, status, usage = os.wait4(process, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return Cost(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def copy_seconds(paths: list[Path], target: Path) -> float:
    """How long it takes to copy the inputs' bytes once into nothing and one model's bytes to the disk."""
    began = time.perf_counter()
    for path in paths:
        with path.open("rb") as file:
            while file.read(2**23):
                pass
    shutil.copyfile(paths[0], target)
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def hash_seconds(paths: list[Path]) -> float:
    """Processor seconds that hashing these files takes by itself, which the first merge with them does besides."""
    began = time.process_time()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", type=Path, required=True, help="the Python of an environment with mergekit==0.1.5")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--folder", type=Path, help="work here and keep the models")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "c" / "model.safetensors").is_file():
        # in a process of its own: the peak memory of a child begins with what its parent had when it was started
        sizes = (arguments.layers, arguments.hidden, arguments.vocabulary)
        maker = multiprocessing.get_context("spawn").Process(target=make_models, args=(folder, *sizes))
        maker.start()
        maker.join()
    size = (folder / "base" / "model.safetensors").stat().st_size
    mergekit = arguments.mergekit_python.parent / "mergekit-yaml"
    ftcli = Path(sys.executable).parent / "ftcli"
    measured: dict[str, dict[str, list[Cost]]] = {method: {tool: [] for tool in TOOLS} for method in arguments.methods}
    for _ in range(arguments.rounds):
        for method in arguments.methods:
            recipe = write_recipe(folder, method)
            ours = [str(ftcli), "merge", str(recipe), "-o", str(folder / "out"), "--no-verify"]
            theirs = [str(mergekit), str(recipe), str(folder / "out"), "--random-seed", "0", "--no-write-model-card"]
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for tool, command in zip(TOOLS, (theirs, ours, ours), strict=True):
                measured[method][tool].append(run(command, folder))
                shutil.rmtree(folder / "out")
    copied = copy_seconds([folder / name / "model.safetensors" for name in ("base", *NAMES)], folder / "copy")
    report(measured, size, copied, hash_seconds([folder / "base" / "model.safetensors"]))
    if arguments.json:
        rows = {method: {tool: [vars(cost) for cost in costs] for tool, costs in tools.items()} for method, tools in measured.items()}
        arguments.json.write_text(json.dumps({"model_bytes": size, "copy_seconds": copied, "costs": rows}, indent=1) + "\n")


def report(measured: dict[str, dict[str, list[Cost]]], size: int, copied: float, hashed: float) -> None:
    """Medians over rounds, and their ratios to mergekit's."""
    print(f"a model: {size / 2**20:.0f} MiB; reading four and writing one: {copied:.2f} s, hashing one: {hashed:.2f} processor s\n")
    print("| method | tool | processor s | wall s | peak MiB | processor ratio | memory ratio |\n|---|---|--:|--:|--:|--:|--:|")
    for method, tools in measured.items():
        medians = {
            tool: [median(getattr(cost, name) for cost in costs) for name in ("processor_seconds", "wall_seconds", "peak_bytes")]
            for tool, costs in tools.items()
        }
        for tool, (processor, wall, peak) in medians.items():
            ratios = "| |"
            if tool != "mergekit":
                ratios = f"{processor / medians['mergekit'][0]:.2f} | {peak / medians['mergekit'][2]:.2f} |"
            print(f"| {method} | {tool} | {processor:.1f} | {wall:.1f} | {peak / 2**20:.0f} | {ratios}")


if __name__ == "__main__":
    main()
