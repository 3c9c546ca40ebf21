"""A GGUF file, loaded by transformers and by llama.cpp, and compared with the model it was written from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ftcli.exporting.checks import Check
from ftcli.exporting.difference import Difference, compare, logits_on
from ftcli.exporting.formats.format import Subject
from ftcli.exporting.gguf.settings import config_in, slowed
from ftcli.exporting.gguf.vocabulary import PROBE_TEXTS, conversation_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

MAX_ERROR = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.02, "q5_1": 0.08, "q5_0": 0.1, "q4_1": 0.15, "q4_0": 0.2}
MAX_ERROR |= {"q6_k": 0.05, "q5_k": 0.1, "q4_k": 0.2, "q3_k": 0.3, "q2_k": 0.5}
"""Largest difference of a tensor from its source, as a share of the source's length: rounding stays below, an error of order does not."""
MAX_KL = 1e-5  # nats per token between what has the same weights: f32 files, and settings; sums come in another order
MAX_KL_BY_CHANCE, LEAST_KL_OF_ROUNDING = 2.0, 1e-4
"""Times the KL that chance makes of errors of MAX_ERROR, which depends on the model; and what is never asked about."""
MAX_KL_RATIO, MAX_KL_OF_ACTIVATIONS, _LOST_AGREEMENT = 10.0, 1e-2, 0.03
_TAIL = 1e-6
_SETTINGS = (
    *("head_dim", "rope_parameters", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "layer_types"),
    *("sliding_window", "max_position_embeddings", "n_positions", "n_inner", "rms_norm_eps", "layer_norm_epsilon", "attention_bias"),
    *("mlp_bias", "vocab_size"),
)


def by_transformers(subject: Subject, path: Path, kind: str) -> Check:
    """Every tensor within the rounding of its type, every setting the source's, and the logits of what transformers makes of the file.

    Nothing but the file is asked for settings: what its loader does not read is read from the metadata.
    """
    name = "the file, loaded by transformers"
    unread, loaded = _load(path)
    note = f"its loader does not read {', '.join(unread)}: set as the file says" if unread else ""
    wrong = _wrong_tensors(subject.model, loaded, kind)
    if wrong:
        return Check(name, False, f"tensors that differ: {', '.join(wrong[:5])}")
    rows, expected = in_context(subject, loaded.config)
    own, logits = logits_on(subject.model, rows), logits_on(loaded.to(subject.source.device), rows)
    if not (lost := compare(expected, own)).kl < MAX_KL:
        return Check(name, False, "these weights are not what the source computes with", lost)
    with _lent(subject.model, loaded):
        lost = compare(logits_on(subject.model, rows), logits)
    found = compare(expected, logits)
    if not lost.kl < MAX_KL:
        return Check(name, False, f"a setting is lost: with the same weights, the model and the file are KL {lost.kl:.1e} apart", found)
    if kind == "f32":
        return Check(name, found.kl < MAX_KL and found.argmax_agreement == 1.0, note, found)
    _round_by_chance(loaded, subject.model, MAX_ERROR[kind[:4]])
    by_chance = compare(own, logits_on(loaded, rows)).kl
    if not found.kl < MAX_KL_BY_CHANCE * by_chance + LEAST_KL_OF_ROUNDING:
        said = f"errors of {MAX_ERROR[kind[:4]]:.1%} by chance make KL {by_chance:.1e}"
        return Check(name, False, f"that is no rounding to {kind}: {said}", found)
    return Check(name, True, note, found)


def _round_by_chance(loaded: torch.nn.Module, model: torch.nn.Module, share: float) -> None:
    """Give `loaded` the weights of `model`, matrices with errors of a share of their length in directions of chance."""
    import torch

    generator, ours = torch.Generator().manual_seed(0), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            own = parameter.copy_(ours[name])
            if own.dim() > 1:
                chance = torch.randn(own.shape, generator=generator).to(own.device)
                own += chance * (share * own.norm() / chance.norm())


def in_context(subject: Subject, config: PretrainedConfig) -> tuple[list[list[int]], Tensor]:
    """(rows of the probe, the source's logits at their tokens), no row beyond the context of the file."""
    import torch

    probe, longest = subject.source.probe, config.get_text_config().max_position_embeddings
    parts = subject.expected.split([len(ids) for ids in probe])
    return [ids[:longest] for ids in probe], torch.cat([part[:longest] for part in parts])


def _load(path: Path) -> tuple[list[str], Any]:
    """(settings that transformers' loader does not take from the file, the model with the settings of the file)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_in(path)
    with redirect_stderr(StringIO()):  # a progress bar that cannot be turned off otherwise
        unread = _unread(config, AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, gguf_file=path.name, config=config)
    return unread + ["the factors of RoPE"] * slowed(loaded, path), loaded


@contextmanager
def _lent(model: torch.nn.Module, lender: torch.nn.Module) -> Iterator[None]:
    """`model` computes with the weights of `lender` inside."""
    theirs, own = dict(lender.named_parameters()), {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = theirs[name].data
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]


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


def _unread(said: Any, loaded: Any) -> list[str]:
    """Settings of the file that transformers' loader does not take from it."""
    return [name for name in _SETTINGS if not _same(getattr(said, name, None), getattr(loaded, name, None))]


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

    source, (rows, expected) = subject.source, in_context(subject, config_in(path))
    with TemporaryDirectory() as folder:
        answer = Path(folder) / "logits.npy"
        texts = (*PROBE_TEXTS, *filter(None, [conversation_text(source.tokenizer)]))
        question = {"path": str(path), "probe": rows, "texts": texts, "stops": source.tokenizer.stop_ids}
        asked = json.dumps({**question, "num_threads": torch.get_num_threads()})
        command = [sys.executable, "-m", "ftcli.exporting.gguf.run_llama_cpp", str(answer)]
        finished = subprocess.run(command, input=asked, capture_output=True, text=True, errors="replace", check=False)
        if finished.returncode != 0:
            last = next(reversed(finished.stderr.strip().splitlines()), f"it ends with code {finished.returncode}")
            return Check(name, False, last)
        logits = torch.from_numpy(np.load(answer))
    found = compare(expected, logits[:, : expected.shape[1]])
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
