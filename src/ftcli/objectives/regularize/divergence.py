"""How far the model's predictions are from a teacher's, summed over targets, without ever holding all their logits.

The gradient with respect to the logits z of a target has a closed form, with q = softmax(z / T) and p the teacher's:
T² KL(p ‖ q) has T (q - p), and T² KL(q ‖ p) has T q (ln q - ln p - KL). Where p = q both are exactly zero. They hold for a teacher of
which the likeliest tokens and the sum of the rest are known, too, if p spreads that sum as q does. So the head's backward pass is
taken in the forward pass, while a chunk's logits are there, and only gradients of the hidden states' size are kept.
Legend: ``T`` token slots or the temperature, ``M`` targets, ``D`` hidden size, ``C`` targets of a chunk, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ftcli.layout.model import inner_model
from ftcli.models.head import HeadTransform, chunk_size

if TYPE_CHECKING:
    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel
    from ftcli.objectives.regularize.teacher import Answer


class Answers(Protocol):
    """A teacher, or what is kept of its answers."""

    def answer(self, model: TreeModel, batch: Batch, temperature: float) -> Answer: ...


class Divergence:
    """The KL to a teacher as a part of the loss."""

    reads_hidden = True
    is_decoupled = False

    def __init__(
        self, name: str, *, weight: float, temperature: float, is_reverse: bool, sources: frozenset[int], answers: Answers
    ) -> None:
        """
        Args:
            sources: whose targets are held.
        """
        self.name, self.weight, self.temperature, self.is_reverse = name, weight, temperature, is_reverse
        self.sources, self.answers = sources, answers

    def loss_sum(self, model: TreeModel, batch: Batch, hidden: Tensor) -> Tensor:
        """weight x T² x KL in nats, summed over the held targets by their weights."""
        rows = held_targets(batch, self.sources)
        if len(rows) == 0:
            return hidden.sum() * 0.0  # a graph all the same: data-parallel wrappers wait for every gradient
        head = inner_model(model.module).get_output_embeddings()
        pieces = _Pieces(
            head, model.transform, self.answers.answer(model, batch, self.temperature), rows, batch.weights[rows], self.temperature,
            self.is_reverse,
        )  # fmt: skip
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        total: Tensor = _InPieces.apply(hidden[batch.predict_from[rows]], pieces, *trained)  # type: ignore[no-untyped-call]
        return self.weight * total

    def decoupled_loss(self) -> Tensor | None:
        """None: it is in the loss."""
        return None

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: the gradient has done it."""


def held_targets(batch: Batch, sources: frozenset[int]) -> Tensor:
    """(C,) indices of the targets whose examples come from one of `sources`."""
    assert batch.origin is not None, "only training batches have targets to hold"
    is_held = torch.tensor([source in sources for source, _ in batch.origin.trees], device=batch.example.device)
    return is_held[batch.example].nonzero().squeeze(1)


class _Pieces:
    """A divergence, a few targets at a time."""

    def __init__(
        self,
        head: nn.Module,
        transform: HeadTransform,
        answer: Answer,
        rows: Tensor,
        weights: Tensor,
        temperature: float,
        is_reverse: bool,
    ) -> None:
        self.head, self.transform, self.answer = head, transform, answer
        self.rows, self.weights, self.temperature, self.is_reverse = rows, weights, temperature, is_reverse

    def piece(self, states: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum over some targets, their (C, V) logits with the graph, and the gradient of the sum with respect to these."""
        logits = self.transform(self.head(states))
        with torch.no_grad():
            ours = (logits / self.temperature).log_softmax(-1)
            theirs = self.answer.log_probs(self.rows[part], ours)
            ratio = (ours - theirs) if self.is_reverse else (theirs - ours)
            probabilities = ours.exp()
            weights = self.weights[part]
            if self.is_reverse:
                values = (probabilities * ratio).sum(-1)
                gradient = probabilities.mul_(ratio.sub_(values[:, None]))
            else:
                their_probabilities = theirs.exp()
                values = (their_probabilities * ratio).sum(-1)
                gradient = probabilities.sub_(their_probabilities)
            values.clamp_min_(0.0)  # what is below is rounding
            gradient *= (self.temperature * weights)[:, None]
            return (values * weights).sum() * self.temperature**2, logits, gradient


class _InPieces(torch.autograd.Function):
    """The sum over all pieces, with the gradients of the hidden states and of the head's trained parameters taken on the way."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, pieces: _Pieces, *parameters: Tensor) -> Tensor:
        needed = [states] if states.requires_grad else []
        gradients = [torch.zeros_like(tensor) for tensor in (*needed, *parameters)]
        total = torch.zeros((), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        size = chunk_size(int(getattr(pieces.head, "out_features", 0)) or 2**15, states)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            with torch.enable_grad():
                own = states[part].detach().requires_grad_(states.requires_grad)
                value, logits, gradient = pieces.piece(own, part)
            total += value
            inputs = [*([own] if needed else []), *parameters]
            if inputs:
                found = torch.autograd.grad(logits, inputs, gradient)
                for index, (sums, new) in enumerate(zip(gradients, found, strict=True)):
                    (sums[part] if needed and index == 0 else sums).add_(new)
        ctx.has_states = bool(needed)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient * upstream.to(gradient.dtype) for gradient in ctx.saved_tensors]
        states = gradients.pop(0) if ctx.has_states else None
        return (states, None, *gradients)
