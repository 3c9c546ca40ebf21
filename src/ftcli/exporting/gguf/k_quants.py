"""k-quants: types with blocks of 256 weights, made by llama.cpp from an f32 file.

llama.cpp mixes types (`q4_k_m`: most tensors q4_k, some q6_k) and gives a tensor whose rows are no multiple of 256 long a type with
smaller blocks. Which tensors that are is read from the file and told.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import MissingExtraError, Problem, RequestError, RunError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCK = 256
K_QUANTS = {
    "q2_k": 3.4, "q3_k_s": 3.6, "q3_k_m": 4.0, "q3_k_l": 4.3, "q4_k_s": 4.7, "q4_k_m": 4.9, "q5_k_s": 5.6, "q5_k_m": 5.8, "q6_k": 6.6,
}  # fmt: skip
"""About how many bits a weight takes in a large model."""
INSTEAD = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""The type with blocks of 32 that llama.cpp takes for rows that are no multiple of 256 long."""
_SHOWN = 3


def require_llama_cpp(kind: str) -> None:
    """Raise a MissingExtraError where llama.cpp's Python package is not installed."""
    if find_spec("llama_cpp") is None:
        raise MissingExtraError(f"--dtype {kind} (made by llama.cpp)", "llama-cpp")


def check_rows(config: PretrainedConfig, kind: str) -> None:
    """Refuse a model of which no tensor can be stored as asked for.

    Raises:
        RequestError: no row is a multiple of 256 long.
    """
    text: Any = config.get_text_config()
    hidden = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    heads = (getattr(text, "head_dim", None) or hidden // text.num_attention_heads) * text.num_attention_heads
    if all(length % BLOCK for length in (hidden, inner, heads)):
        what = f"its rows are {hidden} and {inner} long, `{kind}` has blocks of {BLOCK}"
        raise RequestError(
            f"no weight of the model can be stored as {kind}", [Problem("config.json", what, f"--dtype {INSTEAD[kind[:4]]}")]
        )


def quantise(plain: Path, path: Path, kind: str) -> None:
    """Write `plain`, an f32 file, as `kind` to `path`.

    llama.cpp runs as a program of its own: what it cannot do may end it.

    Raises:
        RunError: it did not finish.
    """
    import torch

    asked = json.dumps({"plain": str(plain), "path": str(path), "kind": kind, "num_threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "ftcli.exporting.gguf.quantise_by_llama_cpp"]
    finished = subprocess.run(command, input=asked, capture_output=True, text=True, errors="replace", check=False)
    if finished.returncode != 0:
        last = next(reversed(finished.stderr.strip().splitlines()), f"it ends with code {finished.returncode}")
        raise RunError(f"llama.cpp could not write {kind}: {last}", hint="is the disk full? `--dtype q8_0` is written without it")


def fallen_back(path: Path) -> str:
    """In words: tensors of a k-quant that have smaller blocks because of the length of their rows; empty where there are none."""
    from gguf import GGUFReader

    tensors = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1 and tensor.shape[0] % BLOCK]
    tensors = [tensor for tensor in tensors if tensor.tensor_type.name != "F32"]
    if not tensors:
        return ""
    counts = Counter(tensor.tensor_type.name.lower() for tensor in tensors)
    names = ", ".join(tensor.name for tensor in tensors[:_SHOWN]) + (", ..." if len(tensors) > _SHOWN else "")
    as_types = ", ".join(f"{number} as {kind}" for kind, number in sorted(counts.items()))
    return f"rows that are no multiple of {BLOCK} long: {as_types} ({names})"
