"""Which layout a model can be trusted with, decided by computing and not by a list of architectures.

On a few examples of the recipe's own data, and on one made-up tree with branches, three things are compared: the model's own
forward pass over every branch alone, the rows layout, and the forest layout. Log-probabilities and gradients must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftcli.data.tree import SPAN, TokenTree
from ftcli.errors import RequestError
from ftcli.layout.attention import ForestUnsupportedError
from ftcli.layout.build import ancestor_paths, build_batch, leaf_segments
from ftcli.layout.model import TreeModel, inner_model
from ftcli.layout.virtual import soft_prompt_members
from ftcli.models.classifier import POOLING_FIELD, has_token_head, is_classifier, is_encoder

# How far apart two orders of summation may be, relative to the largest value compared, per dtype of the weights.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
MAX_PROBE_TREES = 4
MAX_PROBE_TOKENS = 384
# Beyond this many trainable numbers only a sample of the parameters is compared, so that the probe needs no second gradient.
MAX_COMPARED_NUMBERS = 20_000_000

# What an architecture that does not fit may raise from inside transformers' modelling code.
ARCHITECTURE_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError, AssertionError)


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """The layout a run uses, and why."""

    layout: str
    reason: str
    log_prob_difference: float | None = None
    """Largest difference between the layouts, in nats; None if the forest did not run."""
    gradient_difference: float | None = None
    """Largest difference of a gradient, relative to its largest entry."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_layout(model: TreeModel, trees: Sequence[TokenTree], requested: str, supported: frozenset[str], max_length: int) -> LayoutChoice:
    """Compare the layouts on `trees` and leave `model` in the one to use.

    Args:
        trees: examples of the run's own data.
        requested: ``auto``, ``forest`` or ``rows``.
        supported: layouts that the method can do.
        max_length: longest branch the run may see; a sliding window beyond it cannot matter.

    Raises:
        RequestError: the forest was requested and does not equal rows, or rows do not equal the model's own forward pass.
    """
    probe = _probe_trees(trees, inner_model(model.module).config, max_length)
    weights = [np.where(np.arange(len(tree)) == 0, 0, 1).astype(np.float32) for tree in probe]
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        rows = _measure_rows(model, probe, weights, device)
        _require_own_log_probs(model, probe, rows, device)
        choice = _compare_forest(model, probe, weights, rows, supported)
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    if requested == "rows":
        choice = LayoutChoice("rows", "the recipe asks for it", choice.log_prob_difference, choice.gradient_difference)
    elif requested == "forest" and choice.layout != "forest":
        raise RequestError(
            f"train.layout: `forest` does not fit this model: {choice.reason}", hint="`train.layout: auto` takes rows instead"
        )
    model.use_layout(choice.layout)
    return choice


@dataclass(frozen=True, slots=True)
class _Measured:
    log_probs: Tensor
    """(M,) in the order of (example, branch, position); of a classifier (R, C) logits."""
    gradients: tuple[Tensor, ...]


def _compare_forest(
    model: TreeModel, probe: Sequence[TokenTree], weights: Sequence[Any], rows: _Measured, supported: frozenset[str]
) -> LayoutChoice:
    if "forest" not in supported:
        return LayoutChoice("rows", "the method needs rows")
    device, dtype = next(model.parameters()).device, inner_model(model.module).dtype
    try:
        forest = _measure(model, "forest", probe, weights, device)
    except ForestUnsupportedError as error:
        return LayoutChoice("rows", str(error))
    except ARCHITECTURE_ERRORS as error:
        return LayoutChoice(
            "rows", f"the forest's forward pass fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    tolerance = TOLERANCE.get(dtype, 5e-2)
    log_prob_difference = float((forest.log_probs - rows.log_probs).abs().max())
    gradient_difference = _gradient_difference(forest.gradients, rows.gradients)
    scale = max(1.0, float(rows.log_probs.abs().max()))
    if not log_prob_difference <= tolerance * scale:
        return LayoutChoice("rows", f"log-probabilities differ by {log_prob_difference:.1e}", log_prob_difference, gradient_difference)
    if not gradient_difference <= 10 * tolerance:
        return LayoutChoice("rows", f"gradients differ by {gradient_difference:.1e}", log_prob_difference, gradient_difference)
    return LayoutChoice("forest", "the probe equals rows", log_prob_difference, gradient_difference)


def _gradient_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of a gradient, relative to its largest entry.

    Some gradients are zero but for rounding (a bias of the keys cancels in the softmax), hence the floor by the largest of all.
    """
    scales = [float(gradient.abs().max()) for gradient in expected]
    floor = 1e-3 * max(scales, default=0.0)
    differences = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
    return max((d / max(scale, floor) for d, scale in zip(differences, scales, strict=True) if d > 0), default=0.0)


def _measure(model: TreeModel, layout: str, trees: Sequence[TokenTree], weights: Sequence[Any], device: torch.device) -> _Measured:
    model.use_layout(layout)
    batch = build_batch(layout, trees, weights).to(device)
    log_probs = model(batch)
    compared = _compared_parameters(model)
    gradients = torch.autograd.grad(log_probs.mean(), compared, allow_unused=True) if compared else ()
    return _Measured(
        log_probs.detach(),
        tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, compared, strict=True)),
    )


def _measure_rows(model: TreeModel, trees: Sequence[TokenTree], weights: Sequence[Any], device: torch.device) -> _Measured:
    """The layout every model must be able to do.

    Raises:
        RequestError: this one cannot; the first line of its own error says why.
    """
    try:
        return _measure(model, "rows", trees, weights, device)
    except ARCHITECTURE_ERRORS as error:
        if "out of memory" in str(error):
            raise
        words = (str(error).splitlines() or [""])[0]
        raise RequestError(f"this model cannot be trained: its forward pass fails ({type(error).__name__}: {words})") from error


def _compared_parameters(model: TreeModel) -> list[nn.Parameter]:
    """The trainable parameters, or a spread sample of them where they are many."""
    trainable = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.numel())
    chosen: list[nn.Parameter] = []
    total = 0
    for parameter in trainable:
        total += parameter.numel()
        if total > MAX_COMPARED_NUMBERS and chosen:
            break
        chosen.append(parameter)
    return chosen


def _require_own_log_probs(model: TreeModel, trees: Sequence[TokenTree], rows: _Measured, device: torch.device) -> None:
    """The rows layout must give what the model itself gives for each branch alone, with its own head."""
    if is_classifier(inner_model(model.module)):
        own = own_class_logits(model, trees, device)
    else:
        # A soft prompt is no part of the model inside: there PEFT's own forward pass is what rows must equal.
        own = _mean_own_log_probs(model.module, trees, device)
    difference = float((own - rows.log_probs).abs().max())
    tolerance = TOLERANCE.get(inner_model(model.module).dtype, 5e-2) * max(1.0, float(own.abs().max()))
    if not difference <= tolerance:
        raise RequestError(
            f"this model's own log-probabilities differ by {difference:.1e} nats from those of its decoder and head",
            hint="its forward pass does something to the logits that ftcli does not know; please report the architecture",
        )


def _mean_own_log_probs(module: nn.Module, trees: Sequence[TokenTree], device: torch.device) -> Tensor:
    """`own_log_probs` of the module as it computes alone, of an ensemble of soft prompts their mean."""
    members = soft_prompt_members(module)
    if not members:
        return own_log_probs(inner_model(module), trees, device)
    active, found = module.active_adapter, []
    for member in members:
        module.set_adapter(member)  # type: ignore[operator]
        found.append(own_log_probs(module, trees, device))
    module.set_adapter(active)  # type: ignore[operator]
    return torch.stack(found).mean(dim=0)


@torch.no_grad()
def own_class_logits(model: TreeModel, trees: Sequence[TokenTree], device: torch.device) -> Tensor:
    """(R, C) logits of every branch alone: of the model's ordinary forward pass, or where it does not pool so, of the rows layout."""
    inner = inner_model(model.module)
    pad_id, inner.config.pad_token_id = inner.config.pad_token_id, None
    is_replaced = is_encoder(inner) and has_token_head(inner)
    has_own = getattr(inner.config, POOLING_FIELD, None) is None and not is_replaced and not soft_prompt_members(model.module)
    parts = []
    try:
        for tree in trees:
            bounds = tree.segment_bounds()
            for leaf in leaf_segments(tree):
                tokens = np.concatenate([tree.tokens[slice(*bounds[s])] for s in (*ancestor_paths(tree)[leaf], leaf)])
                batch = build_batch("rows", [_path(tokens)], [np.zeros(len(tokens), dtype=np.float32)]).to(device)
                parts.append(model.module(input_ids=batch.input_ids).logits if has_own else model(batch))
    finally:
        # Without a padding token the last token of a single row is the last, whatever it is.
        inner.config.pad_token_id = pad_id
    return torch.cat(parts).float()


@torch.no_grad()
def own_log_probs(model: nn.Module, trees: Sequence[TokenTree], device: torch.device) -> Tensor:
    """(M,) log-probability of every token but the roots' first, from the model's ordinary forward pass, branch by branch.

    A shared segment's tokens are listed once, with the first branch that runs through it.
    """
    parts = []
    for tree in trees:
        bounds, listed = tree.segment_bounds(), set[int]()
        for leaf in leaf_segments(tree):
            path = (*ancestor_paths(tree)[leaf], leaf)
            tokens = torch.from_numpy(np.concatenate([tree.tokens[slice(*bounds[s])] for s in path]).astype(np.int64)).to(device)
            new = np.concatenate([np.full(bounds[s][1] - bounds[s][0], s not in listed) for s in path])
            listed.update(path)
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, -len(tokens) : -1]
            log_probs = logits.float().log_softmax(dim=-1)
            chosen = log_probs.gather(1, tokens[1:, None]).squeeze(1)
            parts.append(chosen[torch.from_numpy(new[1:]).to(device)])
    return torch.cat(parts)


def _probe_trees(trees: Sequence[TokenTree], config: Any, max_length: int) -> list[TokenTree]:
    """Short examples of ragged lengths, one tree with branches, and one longer than the sliding window if the run can exceed it."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    chosen = [_cut(tree, MAX_PROBE_TOKENS) for tree in trees[:MAX_PROBE_TREES]]
    chosen = [tree for tree in chosen if len(tree) >= 2]
    tokens = np.concatenate([tree.tokens for tree in chosen])
    chosen.append(_branching(tokens))
    if window is not None and max_length > window:
        chosen.append(_path(np.resize(tokens, window + 9)))
    return chosen


def _path(tokens: Any) -> TokenTree:
    root = np.zeros(1, dtype=np.int32)
    return TokenTree(tokens.astype(np.int32), root, root - 1, np.zeros(0, dtype=SPAN), 0, 0)


def _cut(tree: TokenTree, length: int) -> TokenTree:
    return tree if len(tree) <= length else _path(tree.tokens[:length])


def _branching(tokens: Any) -> TokenTree:
    """A prompt with two answers, one of which splits again, of lengths that divide nothing evenly."""
    starts = np.array([0, 7, 12, 15, 20], dtype=np.int32)
    parents = np.array([-1, 0, 0, 2, 2], dtype=np.int32)
    return TokenTree(np.resize(tokens, 26).astype(np.int32), starts, parents, np.zeros(0, dtype=SPAN), 0, 0)
