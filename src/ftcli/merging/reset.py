"""Half-reset: a part of the merged tensors is put back to the base's, to get back what the base knew.

Source: Hui et al. 2024, arXiv:2404.18466 (half fine-tuning), used on weights that are trained already.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from ftcli.merging.layers import embedding_name, is_buffer, is_head, is_tied
from ftcli.merging.numbers import STORED
from ftcli.merging.planned import Input, TensorPlan
from ftcli.merging.recipe import MergeRecipe, Reset
from ftcli.merging.settings import Wrong
from ftcli.merging.sources import Source

Homes = dict[str, str]
"""The base's names of the merged model's tensors in layers."""

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


def with_reset(
    recipe: MergeRecipe, tensors: Sequence[TensorPlan], sources: Sequence[Source], index: Mapping[str, int], homes: Homes, wrong: Wrong
) -> list[TensorPlan]:
    """The tensors of a plan, those that the recipe resets as copies of the base's."""
    if recipe.reset is None or recipe.base is None:
        return list(tensors)
    base = index[recipe.base]
    names = reset_names([tensor.name for tensor in tensors], recipe.reset, recipe.seed)
    changed, missing, odd = [], [], []
    for tensor in tensors:
        if tensor.name not in names or is_buffer(tensor.name):
            changed.append(tensor)
            continue
        home = _in_base(sources[base], homes.get(tensor.name, tensor.name))
        if home is None or (sources[base].tensor(home).shape != tensor.shape and not tensor.is_vocabulary):
            missing.append(tensor.name)
        elif (dtype := sources[base].tensor(home).dtype) not in STORED and dtype != tensor.dtype:
            odd.append(f"`{home}` is {dtype}")
        else:
            inputs = (Input(base, home),)
            changed.append(TensorPlan(tensor.name, tensor.shape, tensor.dtype, inputs, None, {}, (), True, tensor.is_vocabulary))
    if missing:
        more = f" ... and {len(missing) - 1} more" if len(missing) > 1 else ""
        wrong(recipe.where(("reset",)), f"the base has no tensor of that place and shape for `{missing[0]}`{more}", None)
    if odd:
        wrong(recipe.where(("reset",)), f"the base's weights cannot be computed with: {odd[0]}", "save it as bfloat16 or float32 first")
    return changed


def _in_base(base: Source, name: str) -> str | None:
    if name in base.tensors:
        return name
    return embedding_name(base) if is_head(name) and name.endswith(".weight") and is_tied(base.config) is not False else None
