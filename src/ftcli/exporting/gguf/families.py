"""What GGUF's runtimes expect of each family: names, the order of rows, and norms; `settings` has the numbers of the architecture.

Sources: the GGUF specification (ggml, docs/gguf.md) for the names, and the transformers model of each family for what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError
from ftcli.exporting.gguf.settings import FACTORS, problems_of, rope_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


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


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "Llama", interleaves_rope=True),
    "mistral": Family("llama", "Mistral", interleaves_rope=True),
    "qwen2": Family("qwen2", "Qwen2"),
    "qwen3": Family("qwen3", "Qwen3"),
    "gemma2": Family("gemma2", "Gemma 2", norms_are_offsets=True),
    "gemma3_text": Family("gemma3", "Gemma 3", norms_are_offsets=True),
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
    if found := problems_of(config.get_text_config()):
        raise RequestError("the model cannot become GGUF", [Problem("config.json", f"GGUF has no place for {what}") for what in found])
    return FAMILIES[kind]


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
        if not tensor.is_floating_point():
            raise RequestError("the model cannot become GGUF", [Problem("", f"`{name}` holds stored integers, and no weights")])
        yield gguf_name, name, as_stored(name, tensor.detach().float(), model.config.get_text_config(), family)
    factors = rope_factors(model)
    if factors is not None:
        yield FACTORS, "", factors


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
