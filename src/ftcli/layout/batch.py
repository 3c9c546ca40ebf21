"""What one forward pass sees: the trees of a micro-batch as tensors, and the targets to be predicted.

Legend: ``B`` rows (1 in the forest layout), ``L`` token slots a row, ``T = B * L`` slots, ``M`` targets, ``R`` branches,
``E`` examples, ``G`` numbers of an answer, ``D`` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ftcli.layout.attention import Forest


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the trees of a training batch come from."""

    step: int
    trees: tuple[tuple[int, int], ...]
    """(source, tree) of each tree of the batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The trees of one forward pass on one device."""

    input_ids: Tensor
    """(B, L) int64."""
    position_ids: Tensor
    """(B, L) int64: depth in the tree; a branch continues its parent's count."""
    attention_mask: Tensor | None
    """(B, L) int64, 1 for tokens; None in the forest layout, which has no padding."""
    forest: Forest | None
    """Who attends to whom in the forest layout; None in the rows layout."""
    predict_from: Tensor
    """(M,) int64: index, in the T slots, of the hidden state that predicts each target."""
    targets: Tensor
    """(M,) int64: the token to predict; two branches predict from the same last prompt token."""
    weights: Tensor
    """(M,) float32: the target's weight in the loss, never 0."""
    branch: Tensor
    """(M,) int64: which branch of the batch the target belongs to; a shared segment's targets belong to its first branch."""
    example: Tensor
    """(M,) int64: which tree of the batch the target belongs to."""
    readout: Tensor
    """(R,) int64: slot of the last token of each branch."""
    num_tokens: int
    """Real tokens, without padding, a shared prompt counted once."""
    origin: Origin | None = None
    """Of a training batch, where its trees come from: what is known of them may be used again."""
    labels: Tensor | None = None
    """(E, G) float32: each example's right answer as its objective numbers it; None where answers are made of targets."""
    label_weights: Tensor | None = None
    """(E,) float32: the example's weight in the loss, beside `labels`."""
    features: Tensor | None = None
    """(E, D) what a frozen base makes of each example, where that is known and need not be computed."""

    @property
    def total_weight(self) -> Tensor:
        """Scalar: what the batch adds to the divisor of its step's loss."""
        return self.weights.sum() if self.label_weights is None else self.label_weights.sum()

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {field.name: value.to(device) for field in fields(self) if hasattr(value := getattr(self, field.name), "to")}
        return replace(self, **moved)
