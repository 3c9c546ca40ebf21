"""The configuration of a model with other layers: what it says of each layer must follow the layers to their new places."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
_BY_LAYER = re.compile(r"layer|block_type|pattern|no_rope|_freq$")
_SIZES = re.compile(r"(intermediate_size|num_attention_heads|num_key_value_heads|ffn_multipliers|num_query_heads|num_kv_heads|head_dim)$")
_INDICES = (
    *("mlp_only_layers", "full_attn_idxs", "global_attn_layers", "gqa_layers", "moe_layers", "attn_layer_indices"),
    *("cross_attention_layers", "hybrid_layer_ids"),
)
_FIRST_SO_MANY = ("first_k_dense_replace",)
_PERIODS = (
    *("decoder_sparse_step", "moe_layer_frequency", "interleave_moe_layer_step", "full_attention_interval", "attn_layer_period"),
    *("expert_layer_period", "no_rope_layer_interval", "cross_layer_interval", "moe_every_n_layers", "global_attn_every_n_layers"),
)
_SHARED = ("num_kv_shared_layers", "kv_share_layers")
_EXPLICIT = {
    "full_attention_interval": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
}

LayerOrigin = tuple[Mapping[str, Any], int]
"""The (text) configuration of the model that a layer comes from, and which of its layers it was."""


def merged_layers(config: Mapping[str, Any], origins: Sequence[LayerOrigin]) -> tuple[dict[str, Any], list[str]]:
    """A (text) configuration for layers put together from others.

    Args:
        config: the donor's.
        origins: for each layer of the merged model, where it comes from.

    Returns:
        the configuration, and what it cannot say, in words.
    """
    merged = copy.deepcopy(dict(config))
    if not origins:
        return merged, []
    faults: list[str] = []
    count = next((config[key] for key in NUM_LAYERS_KEYS if isinstance(config.get(key), int)), len(origins))
    for key in NUM_LAYERS_KEYS:
        if key in merged:
            merged[key] = len(origins)
    if len(origins) == count and all(layer == index and other == config for index, (other, layer) in enumerate(origins)):
        return merged, []
    for key, value in config.items():
        if key in _INDICES and isinstance(value, list):
            merged[key] = [index for index, (other, layer) in enumerate(origins) if layer in (other.get(key) or ())]
        elif isinstance(value, list) and len(value) == count and (_BY_LAYER.search(key) or _SIZES.search(key)):
            merged[key] = [_entry(other, key, layer, faults) for other, layer in origins]
        elif key in _FIRST_SO_MANY and isinstance(value, int):
            merged[key] = _leading([layer < (other.get(key) or 0) for other, layer in origins], key, faults)
        elif key in _PERIODS and isinstance(value, int) and value > 1 and _EXPLICIT.get(key, "") not in config:
            if any(index % value != layer % value for index, (_, layer) in enumerate(origins)):
                faults.append(f"`{key}: {value}` says what every {value}th layer is, and the layers would change their places in it")
        elif key in _SHARED and value:
            faults.append(f"`{key}: {value}`: layers that use each other's keys and values cannot be taken apart")
    _windows(merged, config, origins)
    return merged, list(dict.fromkeys(faults))


def _entry(config: Mapping[str, Any], key: str, layer: int, faults: list[str]) -> Any:
    values = config.get(key)
    if isinstance(values, list) and layer < len(values):
        return values[layer]
    faults.append(f"`{key}` is a list with an entry for each layer in one model, and not in another")
    return None


def _leading(flags: Sequence[bool], key: str, faults: list[str]) -> int:
    """How many of `flags` are true, which must be the first ones."""
    if sorted(flags, reverse=True) != list(flags):
        faults.append(f"`{key}` counts layers from the first, and those it counts would no longer be the first")
    return sum(flags)


def _windows(merged: dict[str, Any], config: Mapping[str, Any], origins: Sequence[LayerOrigin]) -> None:
    """Which layers see a window only, written out where the configuration has a rule for it."""
    if isinstance(config.get("layer_types"), list):
        # the explicit list is what counts; the rules beside it would say something else
        merged.pop("sliding_window_pattern", None)
        merged.pop("_sliding_window_pattern", None)
    elif isinstance(config.get("sliding_window_pattern"), int):
        period = merged.pop("sliding_window_pattern")
        merged["layer_types"] = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for _, layer in origins]
    elif config.get("model_type") in ("gemma2", "cohere2") and config.get("sliding_window"):
        period = 2 if config["model_type"] == "gemma2" else 4
        merged["layer_types"] = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for _, layer in origins]
    elif config.get("use_sliding_window") and isinstance(config.get("max_window_layers"), int):
        merged["layer_types"] = [
            "sliding_attention" if layer >= (other.get("max_window_layers") or 0) else "full_attention" for other, layer in origins
        ]
    if isinstance(config.get("max_window_layers"), int):
        inside = [layer < (other.get("max_window_layers") or 0) for other, layer in origins]
        merged["max_window_layers"] = sum(inside) if config.get("use_sliding_window") else len(origins)
