"""Which linear layers of a decoder make keys and values, and which close a feed-forward: by widths, and by words every architecture uses.

Legend: ``H`` hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError
from ftcli.methods.targets import linear_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A whole word of the layer's own name: k_proj, key, kv_proj, qkv_proj, query_key_value, Wqkv.
_KEY_OR_VALUE = re.compile(r"(^|_)w?(q?kv|k|v|keys?|values?)(_|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"att", re.IGNORECASE)


def keys_and_values(model: PreTrainedModel) -> list[str]:
    """Names of the layers that make keys or values; one that makes queries with them is among them.

    Raises:
        RequestError: there are none to be found.
    """
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads if hasattr(config, "num_attention_heads") else 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(num_heads, 1)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    fused = (num_heads + 2 * num_kv_heads) * head_dim
    found = [
        name
        for name in _in_attention(model)
        if _KEY_OR_VALUE.search(name.rpartition(".")[2]) or _sides(model, name) == (config.hidden_size, fused)
    ]
    if not found:
        what = "no layer that makes keys or values was found"
        raise RequestError("the method does not fit the model", [Problem("method.target_modules", what, "name the layers, or all-linear")])
    return found


def closing_layers(model: PreTrainedModel) -> list[str]:
    """Names of the layers that bring a feed-forward's inner activations back to the hidden size."""
    hidden = model.config.get_text_config().hidden_size
    attention = set(_in_attention(model))
    groups: dict[str, list[str]] = {}
    head = model.get_output_embeddings()
    for name in linear_names(model):
        if name not in attention and model.get_submodule(name) is not head:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
    found: list[str] = []
    for names in groups.values():
        back = [name for name in names if _sides(model, name)[1] == hidden]
        from_inner = [name for name in back if _sides(model, name)[0] != hidden]
        # an inner size equal to the hidden one: what closes is defined last
        found += from_inner or (back[-1:] if len(names) > 1 else [])
    return found


def _in_attention(model: PreTrainedModel) -> Iterator[str]:
    return (name for name in linear_names(model) if _ATTENTION.search(name.rpartition(".")[0]))


def _sides(model: PreTrainedModel, name: str) -> tuple[int, int]:
    """(in, out) of a linear layer; GPT-2's Conv1D and quantised layers know them by other names."""
    layer: Any = model.get_submodule(name)
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    num_in, num_out = layer.weight.shape
    return num_in, num_out
