"""Log-probabilities of the targets from their hidden states, without ever holding the (targets x vocabulary) logits.

The head runs in parts, always through the model's own head module, so that a head that is tied, biased, scaled,
soft-capped or carries an adapter is honoured. A plain linear head has a closed form: the gradient of a target's
log-probability with respect to its hidden state is ``(onehot - softmax) @ W``, so a frozen head computes it in the forward pass,
while the logits are at hand, and its backward pass is one multiplication.
Legend: ``M`` targets, ``D`` hidden size, ``V`` vocabulary, ``C`` targets of a chunk, ``W`` token ids of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits that are held at once. On a CPU they should stay near the caches; a GPU wants large products.
CHUNK_LOGITS_CPU = 2**21
CHUNK_LOGITS_GPU = 2**27


@dataclass(frozen=True, slots=True)
class HeadTransform:
    """What a model does to the output of its head before the softmax: ``softcap * tanh(scale * logits / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_transform(model: PreTrainedModel) -> HeadTransform:
    """What this model's configuration says of its logits. The layout probe proves it against the model's own forward pass.

    Source: `logit_scale` of Cohere, `logits_scaling` of Granite, `final_logit_softcapping` of Gemma 2, as transformers names them.
    """
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadTransform(float(scale or 1.0) / float(divisor or 1.0), float(softcap) if softcap else None)


def target_log_probs(hidden: Tensor, targets: Tensor, head: nn.Module, transform: HeadTransform) -> Tensor:
    """Log-probability of each target.

    Args:
        hidden: ``(M, D)`` the state that predicts each target.
        targets: ``(M,)`` int64 token ids.
        head: the model's output embedding module, ``(C, D) -> (C, V)``.

    Returns:
        ``(M,)`` float32, in nats.
    """
    if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
        log_probs: Tensor = _LinearHead.apply(hidden, head.weight, head.bias, targets, transform)  # type: ignore[no-untyped-call]
        return log_probs
    vocabulary = int(getattr(head, "out_features", 0)) or 2**15
    chunks = zip(hidden.split(chunk_size(vocabulary, hidden)), targets.split(chunk_size(vocabulary, hidden)), strict=True)
    parts = [
        checkpoint(_chunk_log_probs, states, chunk_targets, head, transform, use_reentrant=False)
        if torch.is_grad_enabled()
        else _chunk_log_probs(states, chunk_targets, head, transform)
        for states, chunk_targets in chunks
    ]
    return torch.cat(parts)


def chunk_size(vocabulary: int, hidden: Tensor) -> int:
    """Targets whose logits are computed at once."""
    return max(16, (CHUNK_LOGITS_GPU if hidden.is_cuda else CHUNK_LOGITS_CPU) // vocabulary)


def _chunk_log_probs(hidden: Tensor, targets: Tensor, head: nn.Module, transform: HeadTransform) -> Tensor:
    logits = transform(head(hidden))
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadTransform) -> Tensor:
    """(C, W) logits as the softmax sees them, float32 or better."""
    return transform(nn.functional.linear(states, weight, bias))


def _slope(logits: Tensor, transform: HeadTransform) -> Tensor | None:
    """(C, W) derivative of the softcap at these logits; None without one."""
    return None if transform.softcap is None else 1 - (logits / transform.softcap).square_()


def _logit_gradient(logits: Tensor, log_norm: Tensor, columns: Tensor, transform: HeadTransform, upstream: Tensor | None) -> Tensor:
    """(C, W) gradient of each target's log-probability with respect to the head's raw output; overwrites `logits`.

    Args:
        columns: ``(C,)`` where among these logits each target stands; outside of ``0..W-1`` it is in another tile.
    """
    slope = _slope(logits, transform)
    gradient = logits.sub_(log_norm[:, None]).exp_().neg_()
    is_inside = (columns >= 0) & (columns < logits.shape[1])
    gradient.scatter_add_(1, _clamped(columns, logits), is_inside.to(gradient.dtype)[:, None])
    if slope is not None:
        gradient.mul_(slope)
    if upstream is not None:
        gradient.mul_(upstream[:, None] * transform.scale)
    elif transform.scale != 1.0:
        gradient.mul_(transform.scale)
    return gradient


def _clamped(columns: Tensor, logits: Tensor) -> Tensor:
    return columns.clamp(0, logits.shape[1] - 1)[:, None]


def _vocabulary_tiles(num_targets: int, vocabulary: int, is_cuda: bool) -> list[slice]:
    """Ranges of token ids whose logits, for all targets at once, fit the budget."""
    width = max(256, (CHUNK_LOGITS_GPU if is_cuda else CHUNK_LOGITS_CPU) // max(1, num_targets))
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _by_tiles(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform, keeps_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities (M,), log-normalisers (M,) and gradient (M, D) in one pass over the vocabulary.

    As in attention, the sums are kept relative to the largest logit so far and shrunk where a larger one comes: each row of the
    weight is read once for all targets. The one-hot part of the gradient is added last, so that this is for float32 and better:
    in bfloat16 the two parts of a target that is already likely would cancel to noise.
    Source: Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    largest = states.new_full((len(targets), 1), -torch.inf)
    total, chosen = torch.zeros_like(largest), torch.zeros_like(largest)
    chosen_slope = torch.ones_like(largest)
    pull = torch.zeros_like(states) if keeps_gradient else None
    for tile in _vocabulary_tiles(len(targets), len(weight), states.is_cuda):
        logits = _logits(states, weight[tile], None if bias is None else bias[tile], transform)
        columns = targets - tile.start
        is_inside = ((columns >= 0) & (columns < logits.shape[1]))[:, None]
        chosen = torch.where(is_inside, logits.gather(1, _clamped(columns, logits)), chosen)
        slope = _slope(logits, transform) if keeps_gradient else None
        new_largest = torch.maximum(largest, logits.amax(dim=1, keepdim=True))
        shrink = largest.sub_(new_largest).exp_()
        shares = logits.sub_(new_largest).exp_()
        total.mul_(shrink).add_(shares.sum(dim=1, keepdim=True))
        if slope is not None:
            chosen_slope = torch.where(is_inside, slope.gather(1, _clamped(columns, slope)), chosen_slope)
            shares.mul_(slope)
        if pull is not None:
            pull.mul_(shrink).addmm_(shares, weight[tile])
        largest = new_largest
    log_norms = largest + total.log()
    gradient = None if pull is None else (weight[targets].mul_(chosen_slope).sub_(pull.div_(total))).mul_(transform.scale)
    return (chosen - log_norms).squeeze(1), log_norms.squeeze(1), gradient


def _by_rows(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform, keeps_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same, a few targets at a time with the whole vocabulary, which bfloat16 and float16 need."""
    log_probs = torch.empty(len(targets), dtype=torch.float32, device=states.device)
    log_norms = torch.empty_like(log_probs)
    gradient = torch.empty_like(states) if keeps_gradient else None
    size = chunk_size(len(weight), states)
    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        logits = _logits(states[chunk], weight, bias, transform)
        log_norms[chunk] = logits.logsumexp(dim=1)
        log_probs[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1) - log_norms[chunk]
        if gradient is not None:
            raw = _logit_gradient(logits, log_norms[chunk], targets[chunk], transform, None)
            gradient[chunk] = raw.to(states.dtype) @ weight
    return log_probs, log_norms, gradient


class _LinearHead(torch.autograd.Function):
    """Target log-probabilities of a linear head, part by part, with the closed-form gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform) -> Tensor:
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else weight.dtype
        states, matrix = hidden.to(dtype), weight.to(dtype)
        vector = None if bias is None else bias.to(dtype)
        is_frozen = not weight.requires_grad and not (bias is not None and bias.requires_grad)
        keeps_gradient = is_frozen and hidden.requires_grad
        run = _by_tiles if dtype in (torch.float32, torch.float64) else _by_rows
        log_probs, log_norms, gradient = run(states, matrix, vector, targets, transform, keeps_gradient)
        ctx.transform, ctx.hidden_dtype = transform, hidden.dtype
        if keeps_gradient:
            ctx.save_for_backward(gradient)
        elif not is_frozen:
            ctx.save_for_backward(states, matrix, vector, targets, log_norms, weight, bias)
        return log_probs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if len(ctx.saved_tensors) == 1:
            (gradient,) = ctx.saved_tensors
            return (gradient * upstream[:, None]).to(ctx.hidden_dtype), None, None, None, None
        states, matrix, vector, targets, log_norms, weight, bias = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.zeros_like(states, dtype=log_norms.dtype) if needs_hidden else None
        weight_gradient = torch.empty_like(matrix) if needs_weight else None
        bias_gradient = torch.empty_like(vector) if needs_bias else None
        for tile in _vocabulary_tiles(len(targets), len(matrix), states.is_cuda):
            logits = _logits(states, matrix[tile], None if vector is None else vector[tile], ctx.transform)
            raw = _logit_gradient(logits, log_norms, targets - tile.start, ctx.transform, upstream).to(matrix.dtype)
            if hidden_gradient is not None:
                _add_product(hidden_gradient, raw, matrix[tile])
            if weight_gradient is not None:
                torch.mm(raw.t(), states, out=weight_gradient[tile])
            if bias_gradient is not None:
                bias_gradient[tile] = raw.sum(dim=0)
        return (
            None if hidden_gradient is None else hidden_gradient.to(ctx.hidden_dtype),
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None else bias_gradient.to(bias.dtype),
            None,
            None,
        )


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """``sums += left @ right``; the sums may be of a wider dtype than the factors."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    else:
        sums.add_(left @ right)
