"""A head that is the embedding in the base, and is not any more once an adapter changes one of the two: it gets a tensor of its own.

An adapter changes modules, and a tied pair is two modules with one tensor: LoRA on the embedding leaves what the head computes as it
was. One tensor cannot be both, so that plain weights that equal the adapter have two, and a configuration that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ftcli.merging.layers import is_embedding, is_head, is_tied
from ftcli.merging.stored import OpenFiles, StoredTensor

_COMPARED = 2**20  # elements looked at at once
_HEADS = {
    **dict.fromkeys(
        (
            *("model.embed_tokens.weight", "embed_tokens.weight", "model.language_model.embed_tokens.weight"),
            *("transformer.wte.weight", "wte.weight", "transformer.word_embeddings.weight", "word_embeddings.weight"),
        ),
        "lm_head.weight",
    ),
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
    "gpt_neox.embed_in.weight": "embed_out.weight",
}
"""How checkpoints call the head of a model whose embedding they call so."""


@dataclass(frozen=True, slots=True)
class TiedHead:
    """A head, and the embedding that it is in the base."""

    head: str
    embedding: str
    is_stored: bool
    """The file has a tensor for it all the same."""

    def apart(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The base's tensors with one for the head, which is stored as the embedding where the file has none for it."""
        return {self.head: replace(tensors[self.embedding], name=self.head), **tensors}


def tied_head(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> TiedHead | None:
    """The head that a model ties to its embedding; None where it has a head of its own, or one whose name is not known here."""
    embedding = next((name for name in tensors if is_embedding(name) and name in _HEADS), None)
    if embedding is None or is_tied(config) is False:
        return None
    own = next((name for name in tensors if is_head(name) and name.endswith(".weight")), None)
    return TiedHead(own or _HEADS[embedding], embedding, own is not None)


def unknown_tie(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], changed: Iterable[str]) -> str | None:
    """The changed embedding of a model whose head is tied to it and has no name that is known here."""
    if is_tied(config) is False or any(map(is_head, tensors)):
        return None
    return next((name for name in changed if is_embedding(name) and name not in _HEADS), None)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model with a head of its own."""
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(inner := config.get("text_config"), dict):
        changed["text_config"] = {**inner, "tie_word_embeddings": False}
    return changed


def are_same(first: StoredTensor, second: StoredTensor) -> bool:
    """True when two stored tensors are equal bit for bit."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with OpenFiles() as files:
        for start in range(0, first.size, _COMPARED):
            count = min(_COMPARED, first.size - start)
            if files.stored(first, start, count).tobytes() != files.stored(second, start, count).tobytes():
                return False
    return True
