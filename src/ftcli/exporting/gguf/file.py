"""One GGUF file: metadata, vocabulary, template, tensors in the type asked for."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import GateError, MissingExtraError, Problem, RequestError
from ftcli.exporting.gguf.families import Family, family_of, tensors_of
from ftcli.exporting.gguf.settings import FACTORS, rope_of
from ftcli.exporting.gguf.vocabulary import Vocabulary, strips_after_special, vocabulary_of

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from torch import Tensor
    from transformers import PreTrainedModel

    from ftcli.models.tokenizer import Tokenizer

TYPES = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}
"""What the `gguf` package can write, with its bits per weight."""
BLOCK = 32
_ENDS = ("eot", "eom")
_FLOAT_TYPES = ("f32", "f16", "bf16")


def require_gguf() -> None:
    """Raise a MissingExtraError where the `gguf` package is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("export to GGUF", "gguf") from error


def write_gguf(model: PreTrainedModel, tokenizer: Tokenizer, path: Path, kind: str, name: str) -> None:
    """Write the model with its tokenizer and template.

    Args:
        kind: one of `TYPES`; vectors stay f32, rows that are no multiple of 32 long become f16, and below 8 bits
            the embedding and the head are q8_0.

    Raises:
        RequestError: the model or its tokenizer has no place in GGUF.
        GateError: a weight is not a finite number in the type asked for.
    """
    from gguf import GGUFWriter

    config: Any = model.config.get_text_config()
    family = family_of(model.config)
    embedding: Any = model.get_input_embeddings()
    vocabulary = vocabulary_of(tokenizer, len(embedding.weight))
    writer = GGUFWriter(path, family.architecture)
    _add_metadata(writer, config, family, kind, _title(name, tokenizer))
    _add_tokenizer(writer, tokenizer, vocabulary)
    for gguf_name, _, tensor in tensors_of(model, family):
        data, stored = encoded(gguf_name, tensor, kind)
        writer.add_tensor(gguf_name, data, raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        if error.errno is None:  # numpy's word for fewer bytes written than asked for
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def stored_type(gguf_name: str, shape: Sequence[int], kind: str) -> str:
    """The type in which a tensor is stored in a file of `kind`."""
    if len(shape) < 2 or gguf_name in ("position_embd.weight", FACTORS):
        return "f32"
    if kind in _FLOAT_TYPES:
        return kind
    if shape[-1] % BLOCK:
        return "f16"
    is_outer = gguf_name in ("token_embd.weight", "output.weight")
    return "q8_0" if is_outer and TYPES[kind] < TYPES["q8_0"] else kind


def encoded(gguf_name: str, tensor: Tensor, kind: str) -> tuple[np.ndarray[Any, Any], Any]:
    """(bytes or numbers, GGUF type) of a tensor in a file of `kind`.

    Raises:
        GateError: a weight is not a finite number in that type.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize, quantize

    stored = GGMLQuantizationType[stored_type(gguf_name, tensor.shape, kind).upper()]
    values = np.ascontiguousarray(tensor.cpu().numpy().astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        data = quantize(values, stored)
        if not np.isfinite(dequantize(data, stored)).all():
            problem = Problem(gguf_name, f"holds weights that are no finite numbers in {stored.name.lower()}", "--dtype bf16 or f32")
            raise GateError("the model does not fit in the type asked for", [problem])
    return data, stored


def _add_metadata(writer: GGUFWriter, config: Any, family: Family, kind: str, name: str) -> None:
    """The numbers of the architecture, under the names of the GGUF specification."""
    from gguf import LlamaFileType

    num_heads = config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(2)
    writer.add_context_length(_context(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(num_heads)
    writer.add_vocab_size(config.vocab_size)
    if family.architecture == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    _add_rope(writer, config, head_dim)
    if family.architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if family.architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _title(name: str, tokenizer: Tokenizer) -> str:
    """The model's name, as far as runtimes do not read more into it than there is."""
    if name == "mistral":
        return "Mistral"  # by this very name transformers takes another way, and fails
    is_phi3 = "phi-3" in name.lower() or "phi3" in name.lower()
    known = all(tokenizer.backend.token_to_id(token) is not None for token in ("</s>", "<unk>", "<s>", "<|endoftext|>"))
    if known and strips_after_special(tokenizer):  # llama.cpp knows it by the name alone
        return name if is_phi3 else f"{name} (Phi-3)"
    return re.sub(r"(?i)phi-?3", "phi 3", name) if is_phi3 else name


def _context(config: Any, family: Family) -> int:
    """The context; within the window where the runtime computes full attention in every layer."""
    length: int = config.max_position_embeddings
    window = getattr(config, "sliding_window", None) if family.architecture in ("llama", "phi3", "qwen2", "qwen3") else None
    return min(length, window) if window is not None and getattr(config, "use_sliding_window", True) else length


def _add_rope(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    from gguf import RopeScalingType

    rope = rope_of(config)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    else:
        writer.add_token_merges(vocabulary.merges)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": _id(tokenizer, "unk_token"), "pad": tokenizer.pad_id}
    ids |= dict(zip(_ENDS, further_stops(tokenizer), strict=False))
    for short, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{short}_token_id")(token)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def further_stops(tokenizer: Tokenizer) -> list[int]:
    """The ids of tokens beside EOS at which the model stops.

    Raises:
        RequestError: there are more than a file can say.
    """
    end_of_turn = None if tokenizer.end_of_turn is None else tokenizer.backend.token_to_id(tokenizer.end_of_turn)
    found = [token for token in (end_of_turn, *tokenizer.stop_ids) if token is not None and token != tokenizer.eos_id]
    stops = list(dict.fromkeys(found))
    if len(stops) > len(_ENDS):
        names = ", ".join(repr(tokenizer.backend.id_to_token(token)) for token in stops)
        what = f"GGUF has places for {len(_ENDS)} tokens beside EOS that end an answer, and there are {len(stops)}: {names}"
        raise RequestError("the model cannot become GGUF", [Problem("generation_config.json", what)])
    return stops


def _id(tokenizer: Tokenizer, name: str) -> int | None:
    token = tokenizer.special.get(name)
    found: int | None = None if token is None else tokenizer.backend.token_to_id(token)
    return found
