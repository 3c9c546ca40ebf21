"""What was done to a base model before training, and what it changed: measured when the model is loaded, told in the run's proofs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_ROWS, _LENGTH = 2, 48


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that was done, with the figures that show what it did to the outputs."""

    name: str
    detail: str


def changes_of(model: Any) -> tuple[Change, ...]:
    """What was done to a loaded model, in order."""
    found: tuple[Change, ...] = getattr(model, "ftcli_changes", ())
    return found


def note_change(model: Any, change: Change) -> None:
    """Add to what was done to `model`."""
    model.ftcli_changes = (*changes_of(model), change)


def probe_logits(model: PreTrainedModel, num_tokens: int) -> Tensor:
    """Logits of random tokens, the same for every model: ``(rows, length, vocabulary)``, or ``(rows, labels)`` of a classifier.

    Args:
        num_tokens: ids are drawn below it, so that models with more tokens are asked the same.
    """
    import torch

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LENGTH
    ids = torch.randint(0, num_tokens, (_ROWS, min(_LENGTH, positions)), generator=torch.Generator().manual_seed(0))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            output: Any = model(input_ids=ids.to(model.device))
    finally:
        model.train(was_training)
    logits: Tensor = output.logits
    return logits.float()


def largest_difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """(largest difference of two sets of logits, what rounding may explain): NaN counts as a difference without bound."""
    import torch

    if before.shape != after.shape or not bool(torch.isfinite(after).all()):
        return float("inf"), 0.0
    return float((before - after).abs().max()), max(1.0, float(before.abs().max()))
