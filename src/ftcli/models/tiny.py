"""A tiny model of any architecture: the same configuration with every size shrunk, for smoke runs and tests.

Sizes go by many names; the table holds those transformers uses. What is not in it (activations, norms, biases, tying, the kinds of
layers) stays, so that the tiny model takes the same paths through the code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftcli.models.settings import Init

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LAYERS, _HEADS, _HEAD_DIM, _EXPERTS = 2, 4, 16, 4
_HIDDEN = _HEADS * _HEAD_DIM
_FIXED = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), _HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "global_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 2 * _HIDDEN),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), _HIDDEN // 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), _HIDDEN // 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    "query_pre_attn_scalar": _HEAD_DIM,
    "rotary_dim": _HEAD_DIM // 2,
}
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_NOT_KEPT = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "architectures", "dtype")


def tiny_init(config: PretrainedConfig) -> Init:
    """Random weights of the architecture of `config` with about 64 features and 2 layers; vocabulary and special ids are left to
    the tokenizer.
    """
    text = config.get_text_config()
    default = type(text)()
    fields: dict[str, Any] = {}
    for name in type(text).__dataclass_fields__:
        if name in _NOT_KEPT:
            continue
        small = _small(name, getattr(text, name, None), text)
        if small != getattr(default, name, None):
            fields[name] = small
    return Init(architecture=text.model_type, config=fields)


def _small(name: str, value: Any, config: PretrainedConfig) -> Any:
    if name in _KV_HEADS and value is not None:
        return _shrunk_kv_heads(value, config)
    if name in _FIXED and isinstance(value, int) and not isinstance(value, bool):
        return _FIXED[name]
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
        return _plain_rope(value)
    if name == "attention_types" and value:
        return [[value[0][0][:_LAYERS], _LAYERS // len(value[0][0][:_LAYERS])]]
    if isinstance(value, list) and len(value) == config.num_hidden_layers:
        return _sampled(value)
    return value


def _shrunk_kv_heads(value: Any, config: PretrainedConfig) -> int:
    """As many as heads where there were as many, one where there was one, half as many between."""
    if value == config.num_attention_heads:
        return _HEADS
    return 1 if value == 1 else _HEADS // 2


def _sampled(values: list[Any]) -> list[Any]:
    """The first layer's value and the first that differs from it."""
    return [values[0], next((value for value in values if value != values[0]), values[-1])]


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Without scaling: its factors are tables as long as a head is wide."""
    if "rope_type" not in rope and any(isinstance(value, dict) for value in rope.values()):
        return {name: _plain_rope(value) if isinstance(value, dict) else value for name, value in rope.items()}
    return {"rope_type": "default"} | {name: value for name, value in rope.items() if name in ("rope_theta", "partial_rotary_factor")}
