"""Loss of a held-out source, with perplexity and bits per byte of texts, and the scores of a classifier's labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.layout.build import build_posed
from ftcli.layout.plan import plan_micro_batches
from ftcli.units import bits_per_byte, perplexity

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import nn

    from ftcli.data.store import TreeStore
    from ftcli.objectives import Objective


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """What one evaluation source measures, over all of its targets; prompts are no targets here."""

    loss: float
    """Nats per target, weighted mean."""
    loss_sum: float
    """Nats, summed without weights."""
    num_targets: int
    num_bytes: int
    scores: NDArray[np.float64] | None = None
    """(N, C) what the objective makes of each example, in the order of the source; None where the loss says all."""
    labels: NDArray[np.float64] | None = None
    """(N, G) the right answers beside `scores`."""

    def to_json(self) -> dict[str, Any]:
        if self.scores is not None:
            return {"loss": self.loss, "targets": self.num_targets}
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
    objective: Objective,
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
        model: batch -> what the objective reads.
        progress: called with (examples done, all examples) of this process.

    Raises:
        StoppedError: `is_stopping` became true.
    """
    import torch

    plan = plan_micro_batches((store.lengths + objective.num_added_tokens).tolist(), 1, micro_batch_tokens)[0]
    mine = plan[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    was_training, done = model.training, 0
    scored: list[tuple[list[int], NDArray[np.float64], NDArray[np.float64]]] = []
    model.eval()
    try:
        with torch.inference_mode():
            for part in mine:
                if is_stopping():
                    raise StoppedError
                posed = [objective.pose(store.tree(index), is_measured=True) for index in part]
                batch = build_posed(layout, posed, pad_id).to(accelerator.device)
                outputs = model(batch).double()
                losses = objective.losses(outputs, batch)
                counts = losses.weights > 0
                num_bytes = torch.tensor(sum(item.tree.num_bytes for item in posed), dtype=torch.float64, device=sums.device)
                weighted, unweighted = (losses.values * losses.weights).sum(), (losses.values * counts).sum()
                sums += torch.stack([weighted, losses.weights.double().sum(), unweighted, counts.sum().double(), num_bytes])
                if (scores := objective.scores(outputs, batch)) is not None:
                    assert batch.labels is not None
                    scored.append((part, scores.cpu().numpy(), batch.labels.double().cpu().numpy()))
                done += len(part)
                progress(done, sum(map(len, mine)))
    finally:
        model.train(was_training)
    weighted, weight, unweighted, targets, num_bytes_all = accelerator.reduce(sums).tolist()
    return SourceLoss(weighted / weight, unweighted, round(targets), round(num_bytes_all), *_gathered(accelerator, scored))


def _gathered(accelerator: Accelerator, scored: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | tuple[None, None]:
    """Scores and labels of all processes, in the order of the source."""
    import numpy as np

    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        scored = gather_object(scored)
    if not scored:
        return None, None
    order = np.argsort(np.concatenate([np.array(part) for part, _, _ in scored]))
    return np.concatenate([scores for _, scores, _ in scored])[order], np.concatenate([labels for _, _, labels in scored])[order]
