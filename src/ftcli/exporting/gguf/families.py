"""What GGUF's runtimes expect of each family: names, the order of rows, norms, and the numbers of the architecture.

A runtime computes what its own code for the architecture says, so a setting of the model for which the file format has no place is
refused here rather than written without it. Sources: the GGUF specification (ggml, docs/gguf.md) for the names of the metadata, and
the transformers model of each family for what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

GEMMA3_PERIOD, GEMMA2_PERIOD = 6, 2
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
_ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Family:
    """How one kind of model becomes GGUF tensors."""

    architecture: str
    """Its name in GGUF."""
    title: str
    """Its name for people."""
    interleaves_rope: bool = False
    """The runtime rotates neighbouring features, transformers the two halves of a head: rows of q and k change places."""
    norms_are_offsets: bool = False
    """Norm weights are stored as their difference from 1."""
    transposed: tuple[str, ...] = ()
    """Layers whose weight is stored (in, out): GPT-2's Conv1D."""
    check: Callable[[Any], list[str]] = lambda config: []
    """What of a configuration the runtime cannot compute."""


def _qwen3(config: Any) -> list[str]:
    return ["biases of attention in Qwen3"] if config.attention_bias else []


def _gemma(config: Any) -> list[str]:
    is_third = config.model_type == "gemma3_text"
    name, period = ("gemma3", GEMMA3_PERIOD) if is_third else ("gemma2", GEMMA2_PERIOD)
    found = []
    wide = config.hidden_size // config.num_attention_heads
    scale = wide if config.num_hidden_layers == _GEMMA_27B_LAYERS[name] else config.head_dim
    if config.query_pre_attn_scalar != scale:
        found.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar} (it is {scale} in the runtime)")
    kinds = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(config.num_hidden_layers)]
    if list(config.layer_types) != kinds:
        found.append(f"layer_types other than full attention in every {period}th layer")
    if is_third:
        found += [
            f"{key} {value}" for key in ("attn_logit_softcapping", "final_logit_softcapping") if (value := getattr(config, key, None))
        ]
        local = rope_of(config, "sliding_attention")
        if local.get("rope_theta") != 10_000.0 or local.get("rope_type", "default") != "default":
            found.append("another RoPE than theta 10000 in layers with a window")
    return found


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "Llama", interleaves_rope=True),
    "mistral": Family("llama", "Mistral", interleaves_rope=True),
    "qwen2": Family("qwen2", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3", check=_qwen3),
    "gemma2": Family("gemma2", "Gemma 2", norms_are_offsets=True, check=_gemma),
    "gemma3_text": Family("gemma3", "Gemma 3", norms_are_offsets=True, check=_gemma),
    "phi3": Family("phi3", "Phi-3"),
    "gpt2": Family("gpt2", "GPT-2", transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
}
"""By the model type of transformers."""


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model.

    Raises:
        RequestError: it is of none, or has a setting for which GGUF has no place.
    """
    kind = config.get_text_config().model_type
    if kind not in FAMILIES:
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise RequestError("the model cannot become GGUF", [Problem("", f"`{kind}` is not a family ftcli can write (families: {titles})")])
    family, text = FAMILIES[kind], config.get_text_config()
    found = family.check(text) + _rope_problems(text)
    if found:
        raise RequestError("the model cannot become GGUF", [Problem("config.json", f"GGUF has no place for {what}") for what in found])
    return family


def rope_of(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """The RoPE settings, of layers of `layer_type` where these differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        rope = rope.get(layer_type or "full_attention") or {}
    return dict(rope)


def _rope_problems(config: Any) -> list[str]:
    kind = rope_of(config).get("rope_type", "default")
    return [] if kind in _ROPE_KINDS else [f"RoPE of type `{kind}` that ftcli can write (types: {', '.join(_ROPE_KINDS)})"]


def tensors_of(model: PreTrainedModel, family: Family) -> Iterator[tuple[str, str, Tensor]]:
    """(GGUF name, transformers name, float32 tensor as GGUF has it) of every weight; a head tied to the embedding is left out.

    Raises:
        RequestError: a weight has no place in the architecture.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)
    seen: set[int] = set()
    for name, tensor in model.named_parameters():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise RequestError("the model cannot become GGUF", [Problem("", f"`{name}` has no place in `{family.architecture}`")])
        yield gguf_name, name, as_stored(name, tensor.detach().float(), model.config.get_text_config(), family)
    factors = rope_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", "", factors


def as_stored(name: str, tensor: Tensor, config: Any, family: Family) -> Tensor:
    """A weight of transformers as GGUF has it."""
    owner, _, part = name.rpartition(".")
    if family.interleaves_rope and owner.endswith((".q_proj", ".k_proj")):
        num_heads = config.num_attention_heads if owner.endswith(".q_proj") else config.num_key_value_heads
        return interleaved(tensor, num_heads)
    if family.norms_are_offsets and owner.endswith("norm"):
        return tensor + 1
    if part == "weight" and owner.endswith(family.transposed or ("\0",)):
        return tensor.T
    return tensor


def interleaved(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k, of each head (first half, second half), as (first of the first half, first of the second, second, ...).

    Args:
        tensor: ``(num_heads * head_dim, ...)``.
    """
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """(head_dim / 2,) by how much each frequency of a `llama3` RoPE is slower than the plain one; None for other kinds."""
    import torch

    config: Any = model.config.get_text_config()
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    own: Any = model.get_submodule("model.rotary_emb")
    factors: Tensor = (plain / own.inv_freq.double().cpu()).float()
    return factors
