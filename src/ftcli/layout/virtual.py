"""What a soft prompt puts before every example: embeddings, or keys and values of every layer, read from a PEFT model.

Padding never stands between a soft prompt and the example, so that an example's positions go on where the prompt's end.
In the forest layout the prompt is one root that all trees of the batch hang on, computed once; keys and values go straight
into the attention. Several prompts that answer together are the *members* of an ensemble.
Legend: ``V`` virtual tokens, ``D`` hidden size, ``G`` key/value heads, ``K`` numbers of a head, ``B, L, T`` as in `batch`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from ftcli.layout.batch import Batch

MEMBERS = "soft_prompt_members"
"""Name of the attribute that lists an ensemble's adapters on its PEFT model."""
EMBEDDING_KINDS = ("PROMPT_TUNING", "P_TUNING")
KEY_VALUE_KINDS = ("PREFIX_TUNING",)


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """One soft prompt, computed."""

    embeddings: Tensor | None
    """(V, D); None where the prompt is keys and values."""
    key_values: tuple[tuple[Tensor, Tensor], ...]
    """(1, G, V, K) keys and values of every layer; empty where the prompt is embeddings."""

    def __len__(self) -> int:
        return int(self.key_values[0][0].shape[2] if self.embeddings is None else self.embeddings.shape[0])


def soft_prompt_members(module: nn.Module) -> tuple[str, ...]:
    """Names of the soft prompts that `module` computes with: none, one, or those of an ensemble."""
    if getattr(module, "prompt_encoder", None) is None or getattr(module, "_adapters_disabled", False):
        return ()
    members: tuple[str, ...] = getattr(module, MEMBERS, None) or (module.active_adapter,)  # type: ignore[assignment]
    return members


def num_virtual_tokens(module: nn.Module) -> int:
    """Positions that the soft prompt of `module` takes from the context."""
    members = soft_prompt_members(module)
    configs: Any = getattr(module, "peft_config", {})
    return int(configs[members[0]].num_virtual_tokens) if members else 0


def has_prefix(module: nn.Module) -> bool:
    """Whether the soft prompt of `module` is keys and values."""
    configs: Any = getattr(module, "peft_config", {})
    return any(configs[member].peft_type in KEY_VALUE_KINDS for member in soft_prompt_members(module))


def virtual_tokens(module: nn.Module, member: str) -> VirtualTokens:
    """The soft prompt `member` of `module`, with its graph.

    Raises:
        RequestError: a kind of soft prompt that depends on more than itself.
    """
    config: Any = module.peft_config[member]  # type: ignore[index]
    weight = prompt_weight(module, member)
    if config.peft_type in EMBEDDING_KINDS:
        return VirtualTokens(weight, ())
    if config.peft_type not in KEY_VALUE_KINDS:
        what = f"soft prompts of type `{config.peft_type}` are not supported"
        raise RequestError("the adapter cannot be used", [Problem("adapter", what, ", ".join((*EMBEDDING_KINDS, *KEY_VALUE_KINDS)))])
    heads = config.num_attention_heads
    parts = weight.view(config.num_virtual_tokens, 2 * config.num_layers, heads, config.token_dim // heads)
    keys_and_values = parts.permute(1, 2, 0, 3)[:, None].unbind(0)
    return VirtualTokens(None, tuple(zip(keys_and_values[::2], keys_and_values[1::2], strict=True)))


def prompt_weight(module: nn.Module, member: str) -> Tensor:
    """(V, D), or (V, layers * 2 * G * K) for keys and values: what PEFT saves, with its graph."""
    config: Any = module.peft_config[member]  # type: ignore[index]
    encoder: Any = module.prompt_encoder[member]  # type: ignore[index]
    weight: Tensor = encoder.embedding.weight
    if config.inference_mode:
        return weight
    computed: Tensor = encoder(torch.arange(config.num_virtual_tokens, device=weight.device)[None])
    return computed[0]


def flat_key_values(key_values: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(V, layers * 2 * G * K): keys and values of (1, G, V, K) as PEFT keeps them."""
    parts = torch.stack([part[0] for pair in key_values for part in pair])
    return parts.permute(2, 0, 1, 3).reshape(parts.shape[2], -1)


def decoder_inputs(model: PreTrainedModel, batch: Batch, virtual: VirtualTokens | None) -> dict[str, Any]:
    """Arguments of the decoder for `batch`, after `virtual` where there is one."""
    mask = {"attention_mask": batch.attention_mask} if batch.forest is None else {"forest": batch.forest}
    if virtual is None:
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, **mask}
    count, positions = len(virtual), batch.position_ids + len(virtual)
    if virtual.embeddings is None:
        inputs = {"input_ids": batch.input_ids, "position_ids": positions}
        if batch.forest is not None:
            return {**inputs, "forest": replace(batch.forest, prefix=virtual.key_values)}
        cache = filled_cache(model, virtual.key_values, len(batch.input_ids))
        return {**inputs, "past_key_values": cache, "attention_mask": _longer_mask(batch, count)}
    embedded = model.get_input_embeddings()(batch.input_ids)
    prompt = virtual.embeddings.to(embedded.dtype).expand(len(embedded), -1, -1)
    before = torch.arange(count, device=positions.device).expand(len(positions), -1)
    inputs = {"inputs_embeds": torch.cat([prompt, embedded], dim=1), "position_ids": torch.cat([before, positions], dim=1)}
    if batch.forest is not None:
        return {**inputs, "forest": batch.forest.hung_on(count)}
    return {**inputs, "attention_mask": _longer_mask(batch, count)}


def _longer_mask(batch: Batch, count: int) -> Tensor:
    """(B, V + L): the mask of a batch of rows with the virtual tokens before them."""
    assert batch.attention_mask is not None
    return torch.cat([batch.attention_mask.new_ones(len(batch.attention_mask), count), batch.attention_mask], dim=1)


def filled_cache(model: PreTrainedModel, key_values: tuple[tuple[Tensor, Tensor], ...], num_rows: int) -> Cache:
    """A key/value cache of the model's own kind that holds (1 or B, G, V, K) `key_values` for every row."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(key_values):
        key_rows, value_rows = (part.to(model.dtype).expand(num_rows, -1, -1, -1) for part in (keys, values))
        cache.update(key_rows, value_rows, index)
    return cache
