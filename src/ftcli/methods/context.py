"""What a method may ask for when it is put on a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ftcli.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class AttachContext:
    """The seed, and ways to fetch what some initialisations need; nothing is fetched that is not asked for."""

    seed: int
    """The only thing that random initial weights depend on."""
    sample_batches: Callable[[int], list[dict[str, Tensor]]] | None = None
    """n padded batches of training data, each `input_ids` and `attention_mask` of shape (B, L)."""
    original_base: Callable[[], PreTrainedModel] | None = None
    """The base model as it is before quantisation, on CPU."""
    restoring: bool = False
    """The trained weights are loaded right after, so an initialisation that only sets them can be left out."""
    tokenizer: Tokenizer | None = None
    """For initialisations from text."""
    answers: Callable[[int], list[list[int]]] | None = None
    """Token ids of the n most frequent answers in the training data."""
