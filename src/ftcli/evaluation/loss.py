"""Loss of a held-out source, with perplexity and bits per byte of texts, and the scores of a classifier's labels."""

from __future__ import annotations

import math
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
    from torch import Tensor, nn

    from ftcli.data.store import TreeStore
    from ftcli.objectives import Objective
    from ftcli.objectives.objective import Losses


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
    standard_error: float = 0.0
    """Of `loss`, over examples."""

    def to_json(self) -> dict[str, Any]:
        if self.scores is not None:
            return {"loss": self.loss, "loss_error": self.standard_error, "targets": self.num_targets}
        return {
            "loss": self.loss,
            "loss_error": self.standard_error,
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
    sums = torch.zeros(9, dtype=torch.float64, device=accelerator.device)
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
                totals = [weighted, losses.weights.double().sum(), unweighted, counts.sum().double(), num_bytes]
                sums += torch.stack([*totals, *_moments(losses, len(part))])
                if (scores := objective.scores(outputs, batch)) is not None:
                    assert batch.labels is not None
                    scored.append((part, scores.cpu().numpy(), batch.labels.double().cpu().numpy()))
                done += len(part)
                progress(done, sum(map(len, mine)))
    finally:
        model.train(was_training)
    weighted, weight, unweighted, targets, num_bytes_all, *moments = accelerator.reduce(sums).tolist()
    all_scores, all_labels = _gathered(accelerator, scored)
    error = _standard_error(weighted, weight, *moments)
    return SourceLoss(weighted / weight, unweighted, round(targets), round(num_bytes_all), all_scores, all_labels, error)


def _moments(losses: Losses, num_examples: int) -> list[Tensor]:
    """Over examples: their number, and the sums of x^2, w^2 and x w, with x the weighted loss of an example and w its weight."""
    import torch

    weights = losses.weights.double()
    x, w = (torch.zeros(num_examples, dtype=torch.float64, device=weights.device) for _ in range(2))
    x.index_add_(0, losses.example, losses.values.double() * weights)
    w.index_add_(0, losses.example, weights)
    return [torch.tensor(float(num_examples), dtype=torch.float64, device=w.device), (x * x).sum(), (w * w).sum(), (x * w).sum()]


def _standard_error(x: float, w: float, n: float, xx: float, ww: float, xw: float) -> float:
    """Of the ratio x / w of two sums over n examples, to first order; 0 for one example, which says nothing of the spread.

    Example:
        >>> round(_standard_error(6.0, 3.0, 3, 14.0, 3.0, 6.0), 4)  # losses 1, 2 and 3: their deviation over the root of 3
        0.5774
    """
    if n < 2:
        return 0.0
    ratio = x / w
    return math.sqrt(max(0.0, xx - 2 * ratio * xw + ratio * ratio * ww) * n / (n - 1)) / w


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
