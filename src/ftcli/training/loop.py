"""The one training loop: it says when things happen, and knows nothing of what is trained."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ftcli.training.step import optimizer_step

if TYPE_CHECKING:
    from ftcli.training.batches import BatchSource, StepBatches
    from ftcli.training.step import Learner, StepResult


@dataclass(slots=True)
class Progress:
    """How far a run has come: all of it is in every checkpoint."""

    num_steps: int
    step: int = 0
    """The last finished step."""
    batch_chain: str = ""
    """SHA-256 over the digests of all batches so far: two runs with the same chain saw the same targets in the same order."""
    evaluated_step: int = -1
    """The last step after which the evaluation sources were measured."""
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_gain: int = 0
    tokens: int = 0
    targets: int = 0
    source_tokens: list[int] = field(default_factory=list)
    """Tokens of each source so far."""
    seconds: float = 0.0
    """Spent in steps, without hooks."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl; what stands beyond it was written after the checkpoint."""
    pending: dict[str, list[float]] = field(default_factory=dict)
    """Sums since the last log line."""
    stop_reason: str | None = None
    """Set by a hook to end the run after this step."""

    @property
    def is_last(self) -> bool:
        return self.step == self.num_steps


class Hook(Protocol):
    """Looks at the run after each step; it does not touch weights or data."""

    def after_step(self, progress: Progress, batches: StepBatches, result: StepResult) -> None: ...


def train(
    learner: Learner, batch_source: BatchSource, factor_at: Callable[[int, int], float], progress: Progress, hooks: Sequence[Hook]
) -> None:
    """Run the steps that are left, calling every hook, in order, after each of them.

    Args:
        factor_at: learning rate of (step, num_steps) as a factor of the peak.
        progress: where to begin; it is brought up to date before the hooks see it.
    """
    learner.model.train()
    began = time.monotonic()
    for batches in batch_source.between(progress.step + 1, progress.num_steps):
        result = optimizer_step(learner, batches, factor_at(batches.step, progress.num_steps))
        progress.step = batches.step
        progress.tokens += batches.num_tokens
        progress.targets += batches.num_targets
        before = progress.source_tokens or [0] * len(batches.source_tokens)
        progress.source_tokens = [old + more for old, more in zip(before, batches.source_tokens, strict=True)]
        progress.batch_chain = hashlib.sha256((progress.batch_chain + batches.digest).encode()).hexdigest()
        progress.seconds += time.monotonic() - began
        for hook in hooks:
            hook.after_step(progress, batches, result)
        began = time.monotonic()
        if progress.stop_reason is not None:
            return
