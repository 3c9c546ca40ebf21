"""Attention over a forest: each segment attends to itself, causally, and to all of its ancestors, and to nothing else.

One function, registered with transformers' `AttentionInterface`; the mask function beside it builds none. The forest travels
from the decoder's keyword arguments to the function; a model that drops them is noticed and gets the rows layout.
Legend: ``H`` query heads, ``G`` key/value heads, ``T`` tokens, ``K`` tokens of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

FOREST_ATTENTION = "ftcli_forest"


class ForestUnsupportedError(ValueError):
    """This model's attention is not the one that the forest computes; the message says why."""


@dataclass(frozen=True, eq=False)
class Forest:
    """Segments of a flat batch, parents before children."""

    lengths: tuple[int, ...]
    """Tokens of each segment."""
    ancestors: tuple[tuple[int, ...], ...]
    """For each segment, the indices of the segments it hangs on, root first."""
    device: torch.device
    prefix: tuple[tuple[Tensor, Tensor], ...] = ()
    """Keys and values of every layer, (1, G, V, K), that stand before all roots: every segment attends to them."""

    def to(self, device: torch.device) -> Forest:
        return replace(self, device=device)

    def hung_on(self, num_tokens: int) -> Forest:
        """The same trees hung on one root of `num_tokens`, which comes first in the batch."""
        ancestors = tuple((0, *(index + 1 for index in above)) for above in self.ancestors)
        return Forest((num_tokens, *self.lengths), ((), *ancestors), self.device)

    @property
    def num_prefix_tokens(self) -> int:
        return self.prefix[0][0].shape[2] if self.prefix else 0

    @cached_property
    def key_lengths(self) -> tuple[int, ...]:
        """Tokens each segment's last token attends to: the prefix's, its ancestors' and its own."""
        before = self.num_prefix_tokens
        pairs = zip(self.ancestors, self.lengths, strict=True)
        return tuple(before + sum(self.lengths[a] for a in above) + own for above, own in pairs)

    @cached_property
    def query_offsets(self) -> Tensor:
        """(S + 1,) int32: where each segment's queries begin."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def key_offsets(self) -> Tensor:
        """(S + 1,) int32: where each segment's keys begin, after `key_index` has gathered them."""
        return torch.tensor([0, *accumulate(self.key_lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def key_index(self) -> Tensor | None:
        """Index of every key along each segment's ancestors, after those of the prefix; None where no segment has any."""
        before = self.num_prefix_tokens
        if not any(self.ancestors) and not before:
            return None
        starts = [before, *(before + end for end in accumulate(self.lengths))]
        paths = [(*above, index) for index, above in enumerate(self.ancestors)]
        bounds = [(starts[s], starts[s] + self.lengths[s]) for s in range(len(self.lengths))]
        runs = [torch.arange(*run) for path in paths for run in ((0, before), *(bounds[s] for s in path))]
        return torch.cat(runs).to(self.device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    forest: Forest | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each branch of the forest.

    Args:
        query: ``(1, H, T, K)``.
        key, value: ``(1, G, T, K)``; H is a multiple of G.
        forest: the segments of the T tokens.
        sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it in its branch.
        softcap: scores become ``softcap * tanh(score / softcap)``.

    Returns:
        ``(1, T, H, K)`` and no attention weights.

    Raises:
        ForestUnsupportedError: the model asks for something that this function does not compute.
    """
    if forest is None:
        raise ForestUnsupportedError("the model does not hand keyword arguments on to its attention")
    if options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise ForestUnsupportedError("attention sinks or position biases")
    if query.shape[2] != key.shape[2] or query.shape[-1] != value.shape[-1]:
        raise ForestUnsupportedError("values of another size than queries")
    if getattr(module, "is_causal", True) is False:
        raise ForestUnsupportedError("attention is not causal")
    if forest.prefix:
        key, value = _after_prefix(module, key, value, forest)
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and softcap is None and dropout == 0.0:
        return _attend_varlen(query, key, value, forest, scaling, sliding_window), None
    return _attend_by_segment(query, key, value, forest, scaling, dropout, sliding_window, softcap), None


def _after_prefix(module: nn.Module, key: Tensor, value: Tensor, forest: Forest) -> tuple[Tensor, Tensor]:
    """Keys and values of the module's layer with those of the prefix before them."""
    layer = getattr(module, "layer_idx", None)
    if layer is None or len(key) != 1:
        raise ForestUnsupportedError("the attention does not know which layer it is, so that it has no key/value prefix")
    keys, values = forest.prefix[layer]
    return torch.cat([keys.to(key.dtype), key], dim=2), torch.cat([values.to(value.dtype), value], dim=2)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scaling: float | None, sliding_window: int | None) -> Tensor:
    """One kernel for all segments; keys and values are gathered along the ancestors where there are any."""
    from torch.nn.attention.varlen import varlen_attn

    flat_query, flat_key, flat_value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if forest.key_index is not None:
        flat_key, flat_value = flat_key[forest.key_index], flat_value[forest.key_index]
    # window (-1, 0) is causal, aligned to the bottom right: the last query of a segment sees the last key.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = varlen_attn(
        flat_query,
        flat_key,
        flat_value,
        forest.query_offsets,
        forest.key_offsets,
        max(forest.lengths),
        max(forest.key_lengths),
        scale=scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # a pair only if auxiliary values are asked for
    return output.unsqueeze(0)


def _attend_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """One attention per segment. `split` and not slices: the backward of a slice fills a tensor of the whole batch with zeros."""
    queries, prefix = query.split(forest.lengths, dim=2), [forest.num_prefix_tokens] if forest.prefix else []
    # The prefix, where there is one, is segment 0 of the keys and stands above every other.
    keys, values = (x.split([*prefix, *forest.lengths], dim=2) for x in (key, value))
    outputs = []
    for index, ancestors in enumerate(forest.ancestors):
        above, own = ((0, *(a + 1 for a in ancestors)), index + 1) if prefix else (ancestors, index)
        path_keys = torch.cat([*(keys[a] for a in above), keys[own]], dim=2) if above else keys[own]
        path_values = torch.cat([*(values[a] for a in above), values[own]], dim=2) if above else values[own]
        num_queries, num_keys = queries[index].shape[2], path_keys.shape[2]
        has_window = sliding_window is not None and sliding_window < num_keys
        is_plain = not above and not has_window and softcap is None
        mask = None if is_plain else _branch_mask(num_queries, num_keys, sliding_window, query.device)
        if softcap is None:
            attended = scaled_dot_product_attention(
                queries[index],
                path_keys,
                path_values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        else:
            attended = _softcapped(queries[index], path_keys, path_values, mask, scaling, dropout, softcap)
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _branch_mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """(num_queries, num_keys) bool: the last query stands at the last key; causal, and no further back than the window."""
    depth = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - torch.arange(num_keys, device=device)
    mask = depth >= 0
    return mask if sliding_window is None else mask & (depth < sliding_window)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float, softcap: float
) -> Tensor:
    """Attention with capped scores, written out: no kernel of torch has it. Source: Gemma 2, arXiv:2408.00118, section 2."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def no_mask(*_: Any, **__: Any) -> None:
    """The forest itself says who attends to whom, so that no mask is built."""
    return


def register_forest_attention() -> None:
    """Make `FOREST_ATTENTION` a choice of transformers' `set_attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(FOREST_ATTENTION, forest_attention)
    AttentionMaskInterface.register(FOREST_ATTENTION, no_mask)
