"""What a run proves of itself after training, each with the figures that show it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ftcli.layout.build import build_batch
from ftcli.layout.probe import TOLERANCE
from ftcli.methods.parameter_groups import trained_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftcli.data.tree import TokenTree
    from ftcli.layout.model import TreeModel
    from ftcli.models.generate import Answer

# Beyond this many bytes only the beginning of every tensor is hashed, so that a large base costs seconds and not minutes.
MAX_HASHED_BYTES = 2 * 2**30
SAMPLE_NUMBERS = 4096


@dataclass(frozen=True, slots=True)
class Proof:
    """One thing that was checked by computing it."""

    name: str
    passed: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and values; of large models over the beginning of every tensor."""
    named = sorted(tensors, key=lambda item: item[0])
    is_large = sum(t.numel() * t.element_size() for _, t in named) > MAX_HASHED_BYTES
    digest = hashlib.sha256()
    for name, tensor in named:
        flat = tensor.detach().reshape(-1)
        flat = flat[:SAMPLE_NUMBERS] if is_large else flat
        digest.update(name.encode() + flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frozen_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters that do not train."""
    trained = {name for name, _ in trained_parameters(module)}
    return [(name, p) for name, p in module.named_parameters() if name not in trained]


def prove_frozen(before: str, module: nn.Module) -> Proof:
    """Every weight that was not to train is what it was."""
    frozen = frozen_tensors(module)
    is_same = hash_tensors(frozen) == before
    detail = f"{len(frozen)} frozen tensors are bit-identical to before training" if is_same else "a frozen weight has changed"
    return Proof("frozen weights", is_same, detail)


def probe_log_probs(model: TreeModel, trees: Sequence[TokenTree]) -> Tensor:
    """(M,) log-probability of every token of `trees` but the first, in the rows layout, which every model can do."""
    layout = model.layout
    was_training = model.training
    model.eval()
    model.use_layout("rows")
    weights = [(torch.arange(len(tree)) > 0).float().numpy() for tree in trees]
    try:
        with torch.inference_mode():
            batch = build_batch("rows", trees, weights).to(next(model.parameters()).device)
            log_probs: Tensor = model(batch).float().cpu()
            return log_probs
    finally:
        model.use_layout(layout)
        model.train(was_training)


def prove_reloaded(trained: Tensor, reloaded: Tensor, dtype: torch.dtype) -> Proof:
    """What was saved, loaded into a fresh model, gives the log-probabilities of the model in memory."""
    difference = float((trained - reloaded).abs().max())
    tolerance = TOLERANCE.get(dtype, 5e-2) * max(1.0, float(trained.abs().max()))
    detail = f"largest difference {difference:.1e} nats over {len(trained)} tokens"
    return Proof("saved = trained", difference <= tolerance, detail)


def prove_stops(answers: Sequence[Answer], max_new_tokens: int) -> Proof:
    """Answers to training prompts end by themselves."""
    stopped = sum(answer.stopped for answer in answers)
    return Proof("generation stops", stopped == len(answers), f"{stopped} of {len(answers)} answers end within {max_new_tokens} tokens")
