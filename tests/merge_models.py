"""Tiny model folders to merge, real configurations and names, random numbers, made without torch; and merging them by a recipe's text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ftcli.errors import RecipeError
from ftcli.merging.numbers import ITEM_BYTES, Array, from_float32, to_float32
from ftcli.merging.outcome import merge_models
from ftcli.merging.plan import Plan, plan_merge
from ftcli.merging.recipe import load_merge_recipe
from ftcli.merging.stored import OpenFiles, folder_tensors

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors."""
    hidden, inner, key = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{start}self_attn.{name}.weight": (hidden, hidden) for name in ("q_proj", "o_proj")}
        shapes |= {f"{start}self_attn.{name}.weight": (key, hidden) for name in ("k_proj", "v_proj")}
        shapes |= {f"{start}mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{start}mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_tensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """A safetensors file of (dtype, stored elements) by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, stored) in tensors.items():
        count = stored.size * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(stored.shape), "data_offsets": [position, position + count]}
        position += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(stored.tobytes() for _, stored in tensors.values()))


def write_model(
    folder: Path, values: Mapping[str, Array], config: Mapping[str, Any] = LLAMA, *, dtype: str = "BF16", shards: int = 1
) -> Path:
    """A model folder with these numbers, in so many files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stored = {name: (dtype, from_float32(value, dtype)) for name, value in values.items()}
    names = list(stored)
    if shards == 1:
        write_tensors(folder / "model.safetensors", stored)
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number::shards]
        write_tensors(folder / file, {name: stored[name] for name in own})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def random_values(
    shapes: Mapping[str, tuple[int, ...]], seed: int, around: Mapping[str, Array] | None = None, size: float = 1.0
) -> dict[str, Array]:
    """Random numbers of these shapes, `size` away from those `around` which they lie."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        noise = (generator.standard_normal(shape) * size).astype(np.float32)
        found[name] = noise if around is None else around[name] + noise
    return found


def family(folder: Path, *, count: int = 3, config: Mapping[str, Any] = LLAMA, dtype: str = "BF16", shards: int = 1) -> dict[str, Array]:
    """`base` and fine-tunes `a`, `b`, ... in `folder`; the base's numbers."""
    shapes = llama_shapes(config)
    base = {name: to_float32(from_float32(value, dtype), dtype) for name, value in random_values(shapes, 0).items()}
    write_model(folder / "base", base, config, dtype=dtype, shards=shards)
    for number in range(count):
        write_model(folder / "abcdefg"[number], random_values(shapes, number + 1, base, 0.1), config, dtype=dtype, shards=shards)
    return base


def read_values(folder: Path) -> dict[str, Array]:
    """Every tensor of a folder as float32."""
    with OpenFiles() as files:
        return {name: files.whole(tensor) for name, tensor in folder_tensors(folder).items()}


def planned(folder: Path, recipe: str, output: Path | None = None) -> Plan:
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return plan_merge(load_merge_recipe(path), output)


def refused(folder: Path, recipe: str) -> str:
    """What is said of a recipe that cannot be planned."""
    with pytest.raises(RecipeError) as caught:
        planned(folder, recipe)
    return str(caught.value)


def merged(folder: Path, recipe: str, name: str = "out", *, verify: bool = False, **options: Any) -> Path:
    """The folder of the result."""
    path = folder / f"{name}.yaml"
    path.write_text(recipe)
    merge_models(path, folder / name, verify=verify, **options)
    return folder / name
