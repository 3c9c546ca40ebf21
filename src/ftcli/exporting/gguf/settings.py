"""Which settings of a model a GGUF file can say, and the configuration that a file says.

A runtime computes what its own code for the architecture says. So every setting of a configuration is one of three: the file says it;
nothing that is computed depends on it; or the runtime has it in its code, and then it must be what it is there. One that is none of
these is refused by its name, unless it is as transformers has it where nothing is said.

Sources: the GGUF specification (ggml, docs/gguf.md) for the names of the metadata, and the transformers model of each family for what
is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

GEMMA3_PERIOD, GEMMA2_PERIOD = 6, 2
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_SILU, _TANH_GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new", "gelu_python_tanh", "gelu_fast")
FACTORS = "rope_freqs.weight"
"""The tensor that says a `llama3` RoPE."""

_WITHOUT_EFFECT = {
    *("initializer_range", "use_cache", "pretraining_tp", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("reorder_and_upcast_attn", "chunk_size_feed_forward", "original_max_position_embeddings"),  # the last is longrope's, which is refused
    *("architectures", "dtype", "transformers_version", "output_hidden_states", "return_dict", "problem_type", "id2label", "label2id"),
}
# Special tokens are said by the tokenizer, biases and an own head by their tensors, windows of these families by the context.
_BY_OTHERS = {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "vocab_size"}
_WINDOWS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
_COMMON = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("max_position_embeddings", "rope_parameters"),
}
_GEMMA = {*_COMMON, "query_pre_attn_scalar", "layer_types", "sliding_window"}
SAID: dict[str, set[str]] = {
    "llama": {*_COMMON, "attention_bias", "mlp_bias"},
    "mistral": _COMMON | _WINDOWS,
    "qwen2": _COMMON | _WINDOWS,
    "qwen3": _COMMON | _WINDOWS,
    "phi3": _COMMON | _WINDOWS,
    "gemma2": {*_GEMMA, "attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3_text": _GEMMA,
    "gpt2": {"n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon"},
}
"""By the model type of transformers: what the file says."""

_GEMMA_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": _TANH_GELU,
    "attention_bias": (False,),
    "use_bidirectional_attention": (False, None),
}
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": _SILU},
    "mistral": {"hidden_act": _SILU},
    "qwen2": {"hidden_act": _SILU},
    "qwen3": {"hidden_act": _SILU, "attention_bias": (False,)},
    "phi3": {"hidden_act": _SILU},
    "gemma2": {**_GEMMA_FIXED, "tie_word_embeddings": (True,)},
    "gemma3_text": {**_GEMMA_FIXED, "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
    "gpt2": {
        "activation_function": ("gelu_new", *_TANH_GELU),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
}
"""By the model type of transformers: what the runtime has in its code."""
_UNDECLARED: dict[str, tuple[Any, ...]] = {"is_causal": (True,), "use_bidirectional_attention": (False, None)}
"""What transformers' code reads beside the settings that a family declares."""

_CLASSES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "phi3": "Phi3Config"}
_CLASSES |= {"gemma2": "Gemma2Config", "gemma3": "Gemma3TextConfig"}
_ROPE_KEYS = {"default": set[str](), "linear": {"factor"}}
_ROPE_KEYS["llama3"] = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_ROPE_KINDS = {"llama": ("default", "linear", "llama3"), "mistral": ("default", "linear", "llama3")}
_OTHER_KINDS = ("default", "linear")


def problems_of(config: Any) -> list[str]:
    """What of a family's configuration no file can say, in words."""
    kind, own = config.model_type, {field.name: field.default for field in dataclasses.fields(config)}
    found = [] if type(config).__module__.startswith("transformers.") else [f"code of its own (`{type(config).__name__}`)"]
    fixed = _UNDECLARED | FIXED[kind]
    for name, allowed in fixed.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            found.append(f"`{name}: {value}` (it is `{allowed[0]}` in the runtime)")
    known = fixed.keys() | SAID[kind] | _BY_OTHERS | _WITHOUT_EFFECT
    found += [f"`{name}: {getattr(config, name)}`" for name in sorted(own.keys() - known) if getattr(config, name) != own[name]]
    return found + _rope_problems(config) + (_gemma_problems(config) if "gemma" in kind else [])


def rope_of(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """The RoPE settings, of layers of `layer_type` where these differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        rope = rope.get(layer_type or "full_attention") or {}
    return dict(rope)


def _rope_problems(config: Any) -> list[str]:
    rope, kinds = rope_of(config), _ROPE_KINDS.get(config.model_type, _OTHER_KINDS)
    kind = rope.get("rope_type", "default")
    if kind not in kinds:
        return [f"RoPE of type `{kind}` that ftcli can write (types: {', '.join(kinds)})"]
    known = {"rope_type", "type", "rope_theta", *_ROPE_KEYS[kind]} | ({"partial_rotary_factor"} if config.model_type == "phi3" else set())
    whole = {"partial_rotary_factor": 1.0}
    return [f"`{name}: {value}` of RoPE" for name, value in rope.items() if name not in known and value not in (None, whole.get(name))]


def _gemma_problems(config: Any) -> list[str]:
    architecture = "gemma3" if config.model_type == "gemma3_text" else "gemma2"
    found = []
    scale = _gemma_scale(architecture, config)
    if config.query_pre_attn_scalar != scale:
        found.append(f"`query_pre_attn_scalar: {config.query_pre_attn_scalar}` (it is {scale} in the runtime)")
    if list(config.layer_types) != _gemma_layers(architecture, config.num_hidden_layers):
        found.append(f"`layer_types` other than full attention in every {_period(architecture)}th layer")
    if not config.sliding_window:
        found.append("layers with a window without a `sliding_window`")
    if architecture == "gemma3":
        local = rope_of(config, "sliding_attention")
        if local.get("rope_theta") != 10_000.0 or local.get("rope_type", "default") != "default":
            found.append("another RoPE than theta 10000 in layers with a window")
    else:
        caps = {name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
        found += [f"`{name}: {cap}` (the runtime divides by it)" for name, cap in caps.items() if not cap]
    return found


def _period(architecture: str) -> int:
    return GEMMA3_PERIOD if architecture == "gemma3" else GEMMA2_PERIOD


def _gemma_layers(architecture: str, num_layers: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % _period(architecture) else "full_attention" for layer in range(num_layers)]


def _gemma_scale(architecture: str, config: Any) -> int:
    """By what runtimes divide queries, squared: they know the largest Gemma by its layers."""
    is_largest = config.num_hidden_layers == _GEMMA_27B_LAYERS[architecture]
    return int(config.hidden_size // config.num_attention_heads if is_largest else config.head_dim)


def config_in(path: Path) -> PretrainedConfig:
    """What a GGUF file says, and for the rest what runtimes have in their code; nothing of the model it was written from.

    A `llama3` RoPE is `default` here: its factors are a tensor of the file (`slowed`).
    """
    import transformers
    from gguf import GGUFReader

    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    prefix, tensors = f"{architecture}.", {tensor.name for tensor in reader.tensors}
    said = {key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)}
    common = {
        "vocab_size": said["vocab_size"],
        "tie_word_embeddings": "output.weight" not in tensors,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if architecture == "gpt2":
        sizes = {"n_embd": said["embedding_length"], "n_layer": said["block_count"], "n_head": said["attention.head_count"]}
        others = {"n_inner": said["feed_forward_length"], "layer_norm_epsilon": said["attention.layer_norm_epsilon"]}
        return transformers.GPT2Config(**common, **sizes, **others, n_positions=said["context_length"])
    settings: dict[str, Any] = common | {
        "hidden_size": said["embedding_length"],
        "intermediate_size": said["feed_forward_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": said["attention.head_count"],
        "num_key_value_heads": said["attention.head_count_kv"],
        "head_dim": said["attention.key_length"],
        "max_position_embeddings": said["context_length"],
        "rms_norm_eps": said["attention.layer_norm_rms_epsilon"],
        "rope_parameters": _rope_in(said),
    }
    if architecture in ("qwen2", "phi3") and said["attention.key_length"] * said["attention.head_count"] == said["embedding_length"]:
        del settings["head_dim"]  # which these do not declare, and take from the others
    if architecture == "llama":
        settings |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    if architecture == "phi3":
        settings |= {"original_max_position_embeddings": said["context_length"]}
    if architecture.startswith("gemma"):
        settings |= {"sliding_window": said["attention.sliding_window"]}
        settings |= {"layer_types": _gemma_layers(architecture, said["block_count"])}
    if architecture == "gemma2":
        settings |= {f"{part}_logit_softcapping": said[f"{part}_logit_softcapping"] for part in ("attn", "final")}
    if architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": 10_000.0}
        settings["rope_parameters"] = {"full_attention": settings["rope_parameters"], "sliding_attention": local}
    config: PretrainedConfig = getattr(transformers, _CLASSES[architecture])(**settings)
    if architecture.startswith("gemma"):
        config.query_pre_attn_scalar = _gemma_scale(architecture, config)
    return config


def _rope_in(said: Mapping[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": said.get("rope.scaling.type", "default"), "rope_theta": said["rope.freq_base"]}
    if rope["rope_type"] == "linear":
        rope["factor"] = said["rope.scaling.factor"]
    turned = said["rope.dimension_count"] / said["attention.key_length"]
    return rope if turned == 1.0 else {**rope, "partial_rotary_factor": turned}


def slowed(model: Any, path: Path) -> bool:
    """Let each frequency of the model's RoPE be as much slower as the file's factors say; False where it has none."""
    import torch
    from gguf import GGUFReader

    factors: Tensor | None = next(
        (torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(path).tensors if tensor.name == FACTORS), None
    )
    if factors is not None:
        model.get_submodule("model.rotary_emb").inv_freq /= factors
    return factors is not None
