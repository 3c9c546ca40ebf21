"""Half-reset: a part of the merged tensors is put back to the base's, to get back what the base knew.

Source: Hui et al. 2024, arXiv:2404.18466 (half fine-tuning), used on weights that are trained already.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from ftcli.merging.recipe import Reset

_LAYER = re.compile(r"^(.*?\.)(\d+)\.")
_ATTENTION = re.compile(r"attn|attention|mixer|(^|\.)(q|k|v|o)_proj")
_FEED_FORWARD = re.compile(r"mlp|feed_forward|ffn|expert|moe")


def category(name: str) -> str:
    """Attention, feed-forward, or vector.

    Example:
        >>> [category(f"model.layers.0.{name}.weight") for name in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")]
        ['attention', 'feed-forward', 'vector']
    """
    if re.search(r"norm|bias$|ln_", name):
        return "vector"
    return "feed-forward" if _FEED_FORWARD.search(name) else "attention" if _ATTENTION.search(name) else "vector"


def reset_names(names: Sequence[str], reset: Reset, seed: int) -> set[str]:
    """The tensors that go back, the same for the same seed.

    With `category` that share of each category of each layer, in layers only; with `tensor` that share of all tensors.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if reset.unit == "tensor":
            groups.setdefault((), []).append(name)
        elif (match := _LAYER.match(name)) is not None:
            groups.setdefault((match[1], match[2], category(name)), []).append(name)
    chosen: set[str] = set()
    for group in groups.values():
        shuffled = sorted(group, key=lambda name: hashlib.sha256(f"{seed}\0reset\0{name}".encode()).digest())
        chosen.update(shuffled[: round(reset.fraction * len(group))])
    return chosen
