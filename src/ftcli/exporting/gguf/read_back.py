"""A GGUF file, loaded by transformers and by llama.cpp, and compared with the model it was written from."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ftcli.exporting.checks import Check
from ftcli.exporting.difference import Difference, compare, logits_on
from ftcli.exporting.formats.format import Subject
from ftcli.exporting.gguf.vocabulary import PROBE_TEXTS, conversation_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

MAX_ERROR = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.02, "q5_1": 0.08, "q5_0": 0.1, "q4_1": 0.15, "q4_0": 0.2}
MAX_ERROR |= {"q6_k": 0.05, "q5_k": 0.1, "q4_k": 0.2, "q3_k": 0.3, "q2_k": 0.5}
"""Largest difference of a tensor from its source, as a share of the source's length: rounding stays below, an error of order does not."""
MAX_KL = 1e-5  # nats per token of an f32 file; llama.cpp sums in another order
MAX_KL_RATIO, MAX_KL_OF_ACTIVATIONS, _LOST_AGREEMENT = 10.0, 1e-2, 0.03
_TAIL = 1e-6
_SETTINGS = (
    *("head_dim", "hidden_act", "hidden_activation", "activation_function", "rope_parameters", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping", "layer_types", "sliding_window", "max_position_embeddings"),
    *("n_inner", "rms_norm_eps", "layer_norm_epsilon", "attention_bias", "mlp_bias", "pad_token_id", "vocab_size"),
)


def by_transformers(subject: Subject, path: Path, kind: str) -> Check:
    """Every tensor within the rounding of its type, and the logits of what transformers makes of the file."""
    name = "the file, loaded by transformers"
    unread, loaded = _load(subject, path)
    note = f"its loader does not read {', '.join(unread)}: set from the source" if unread else ""
    wrong = _wrong_tensors(subject.model, loaded, kind)
    if wrong:
        return Check(name, False, f"tensors that differ: {', '.join(wrong[:5])}")
    found = compare(subject.expected, logits_on(loaded.to(subject.source.device), subject.source.probe))
    is_near = kind != "f32" or (found.kl < MAX_KL and found.argmax_agreement == 1.0)
    return Check(name, is_near, note, found)


def _load(subject: Subject, path: Path) -> tuple[list[str], Any]:
    """(settings that transformers' loader does not take from the file, the model), with the source's settings where there are any."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    arguments: dict[str, Any] = {"gguf_file": path.name}
    with redirect_stderr(StringIO()):  # a progress bar that cannot be turned off otherwise
        unread = _unread(subject.model.config, AutoConfig.from_pretrained(path.parent, **arguments))
        if unread:
            arguments["config"] = _as_in_file(subject.model.config)
        return unread, AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **arguments)


def _as_in_file(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration under the architecture that the file names: Mistral is a Llama there."""
    from transformers import LlamaConfig

    text = config.get_text_config()
    if text.model_type != "mistral":
        return text
    fields = {key: value for key, value in text.to_dict().items() if key in LlamaConfig.__dataclass_fields__ and key != "model_type"}
    return LlamaConfig(**fields)


def _wrong_tensors(source: torch.nn.Module, loaded: torch.nn.Module, kind: str) -> list[str]:
    ours, theirs = dict(source.named_parameters()), dict(loaded.named_parameters())
    wrong = [f"{name} (only one has it)" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        own, other = ours[name].detach().cpu(), theirs[name].detach()
        if own.shape != other.shape:
            wrong.append(f"{name} (shape {tuple(other.shape)})")
        elif not (error := _error(own, other)) <= MAX_ERROR[kind[:4]]:  # NaN is below nothing
            wrong.append(f"{name} (by {error:.1e})")
    return wrong


def _error(own: Tensor, other: Tensor) -> float:
    """Length of the difference, as a share of the length of `own`."""
    length = float(own.double().norm())
    return float((own.double() - other.double()).norm()) / max(length, 1e-12)


def _unread(source: Any, loaded: Any) -> list[str]:
    """Settings of the model that transformers' loader does not take from the file."""
    text, other = source.get_text_config(), loaded.get_text_config()
    return [name for name in _SETTINGS if not _same(getattr(text, name, None), getattr(other, name, None))]


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) <= _TAIL * max(abs(first), abs(second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return bool(first == second)


def by_llama_cpp(subject: Subject, path: Path, kind: str, rounding: Difference) -> Check:
    """The ids, the end of answers and the logits of llama.cpp, where its Python package is installed.

    Args:
        rounding: what another runtime makes of the same file; llama.cpp rounds activations in its products, too.
    """
    name = "the file, run by llama.cpp"
    if find_spec("llama_cpp") is None:
        return Check(name, None, 'llama-cpp-python is not installed: pip install "ftcli[llama-cpp]"')
    import numpy as np
    import torch

    source = subject.source
    with TemporaryDirectory() as folder:
        answer = Path(folder) / "logits.npy"
        texts = (*PROBE_TEXTS, *filter(None, [conversation_text(source.tokenizer)]))
        question = {"path": str(path), "probe": source.probe, "texts": texts, "stops": source.tokenizer.stop_ids}
        asked = json.dumps({**question, "num_threads": torch.get_num_threads()})
        command = [sys.executable, "-m", "ftcli.exporting.gguf.run_llama_cpp", str(answer)]
        finished = subprocess.run(command, input=asked, capture_output=True, text=True, errors="replace", check=False)
        if finished.returncode != 0:
            last = next(reversed(finished.stderr.strip().splitlines()), f"it ends with code {finished.returncode}")
            return Check(name, False, last)
        logits = torch.from_numpy(np.load(answer))
    found = compare(subject.expected, logits[:, : subject.expected.shape[1]])
    said = json.loads(finished.stdout.strip().splitlines()[-1])
    if said["unknown_stops"]:
        names = ", ".join(repr(source.tokenizer.backend.id_to_token(token)) for token in said["unknown_stops"])
        return Check(name, False, f"it does not stop at {names}", found)
    different = [text for text, ids in zip(texts, said["ids"], strict=True) if ids != source.tokenizer.encode(text)[0]]
    detail = f"cuts {len(different)} of {len(texts)} texts otherwise: {different[0]!r}" if different else "cuts text alike"
    return Check(name, _is_rounding(found, kind, rounding), detail, found)


def _is_rounding(found: Difference, kind: str, rounding: Difference) -> bool:
    """Is the difference no more than rounding? A wrong number in the file moves KL and the likeliest tokens; rounding large logits, KL."""
    if kind == "f32":
        return found.kl < MAX_KL  # it computes GELU from a table of 16-bit numbers: near ties may change places
    is_near = found.kl < MAX_KL_RATIO * rounding.kl + MAX_KL_OF_ACTIVATIONS
    return is_near or found.argmax_agreement > rounding.argmax_agreement - _LOST_AGREEMENT
