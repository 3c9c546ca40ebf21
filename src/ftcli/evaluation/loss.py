"""Loss, perplexity and bits per byte of a held-out source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.data.tree import target_weights
from ftcli.layout.build import build_batch
from ftcli.layout.plan import plan_micro_batches
from ftcli.units import bits_per_byte, perplexity

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from ftcli.data.store import TreeStore


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """What one evaluation source measures, over all of its targets; prompts are no targets here."""

    loss: float
    """Nats per target, weighted mean."""
    loss_sum: float
    """Nats, summed without weights."""
    num_targets: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "perplexity": perplexity(self.loss),
            "bits_per_byte": bits_per_byte(self.loss_sum, self.num_bytes),
            "targets": self.num_targets,
        }


class StoppedError(Exception):
    """A stop was asked for while measuring; nothing is measured."""


def measure_loss(
    accelerator: Accelerator,
    model: nn.Module,
    store: TreeStore,
    *,
    layout: str,
    micro_batch_tokens: int,
    pad_id: int,
    is_stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SourceLoss:
    """Measure `store` with its micro-batches shared by all processes.

    Args:
        model: batch -> (M,) log-probabilities.
        progress: called with (examples done, all examples) of this process.

    Raises:
        StoppedError: `is_stopping` became true.
    """
    import torch

    plan = plan_micro_batches(store.lengths.tolist(), 1, micro_batch_tokens)[0]
    mine = plan[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    was_training, done = model.training, 0
    model.eval()
    try:
        with torch.inference_mode():
            for part in mine:
                if is_stopping():
                    raise StoppedError
                trees = [store.tree(index) for index in part]
                weights = [target_weights(tree, 0.0) for tree in trees]
                batch = build_batch(layout, trees, weights, pad_id).to(accelerator.device)
                log_probs = model(batch).double()
                num_bytes = sum(tree.num_bytes for tree in trees)
                row = [-(log_probs * batch.weights).sum(), batch.weights.double().sum(), -log_probs.sum()]
                sums += torch.stack([*row, *torch.tensor([len(log_probs), num_bytes], dtype=torch.float64).to(sums.device)])
                done += len(part)
                progress(done, sum(map(len, mine)))
    finally:
        model.train(was_training)
    weighted, weight, unweighted, targets, num_bytes_all = accelerator.reduce(sums).tolist()
    return SourceLoss(weighted / weight, unweighted, round(targets), round(num_bytes_all))
