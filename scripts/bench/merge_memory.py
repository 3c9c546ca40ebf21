"""Memory of a merge of large models: sparse files of a 7 B shape, merged in a process of its own, and the most that was resident.

    python scripts/bench/merge_memory.py [--layers 32] [--hidden 4096] [--inner 11008] [--vocabulary 32000] [--methods linear ties]

The inputs are files of holes that read as zeros, but for a few rows of every matrix, so that the whole of every method is gone through;
the output is written in full. A merge may take 1 GB more than the working set of its largest tensor: the pieces of every model that the
threads have in hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("base", "a", "b", "c")
LIMIT = 10**9


def shapes(layers: int, hidden: int, inner: int, vocabulary: int) -> dict[str, list[int]]:
    """A Llama's tensors, head untied."""
    found = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        found |= {f"{start}{name}.weight": [hidden] for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{start}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        found |= {f"{start}mlp.{name}_proj.weight": [inner, hidden] for name in ("gate", "up")}
        found[f"{start}mlp.down_proj.weight"] = [hidden, inner]
    return found | {"model.norm.weight": [hidden], "lm_head.weight": [vocabulary, hidden]}


def write_sparse(folder: Path, tensors: dict[str, list[int]], config: dict[str, Any], seed: int) -> int:
    """A model folder whose weights are holes but for the first rows of each tensor; bytes of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    position = 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        for name, shape in tensors.items():
            file.seek(begin + header[name]["data_offsets"][0])
            count = min(4 * shape[-1], int(np.prod(shape)))
            values = (generator.standard_normal(count) * 0.02).astype(np.float32)
            file.write((values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes())
        file.truncate(begin + position)
    return position


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 32, "hidden": 4096, "inner": 11008, "vocabulary": 32000, "models": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--methods", nargs="*", default=["linear", "ties"])
    parser.add_argument("--folder", type=Path, help="where there is room for one merged model")
    arguments = parser.parse_args()
    tensors = shapes(arguments.layers, arguments.hidden, arguments.inner, arguments.vocabulary)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.inner,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": max(1, arguments.hidden // 128),
        "vocab_size": arguments.vocabulary,
        "tie_word_embeddings": False,
    }
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        names = NAMES[: arguments.models + 1]
        sizes = [write_sparse(folder / name, tensors, config, seed) for seed, name in enumerate(names)]
        if sizes[0] > shutil.disk_usage(folder).free:
            sys.exit(f"the merged model needs {sizes[0] / 1e9:.1f} GB of disk")
        print(f"{sizes[0] / 2e9:.2f} B parameters, {len(names) - 1} models and their base, {sizes[0] / 1e9:.1f} GB each\n")
        print("| method | peak resident MiB | processor s | wall s |\n|---|--:|--:|--:|")
        peaks = [measure(folder, method, names) for method in arguments.methods]
        if max(peaks) > LIMIT:
            sys.exit(f"more than {LIMIT / 1e9:.0f} GB")
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, method: str, names: tuple[str, ...]) -> int:
    """Peak resident bytes of one merge, whose cost is printed."""
    own = {"weight": 1.0, **({"density": 0.5} if method != "linear" else {})}
    document: dict[str, Any] = {"merge_method": method, "models": [{"model": name, "parameters": own} for name in names[1:]]}
    document |= {} if method == "linear" else {"base_model": "base"}
    (folder / "recipe.yaml").write_text(json.dumps(document))
    command = [str(Path(sys.executable).parent / "ftcli"), "merge", str(folder / "recipe.yaml"), "-o", str(folder / "out"), "--no-verify"]
    began = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        actions = [(os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)]
        process = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
        _, status, usage = os.wait4(process, 0)
    if status != 0:
        sys.exit((folder / "log.txt").read_text()[-3000:])
    peak = usage.ru_maxrss * 1024
    wall = time.perf_counter() - began
    print(f"| {method} | {peak / 2**20:.0f} | {usage.ru_utime + usage.ru_stime:.1f} | {wall:.1f} |", flush=True)
    shutil.rmtree(folder / "out")
    return peak


if __name__ == "__main__":
    main()
