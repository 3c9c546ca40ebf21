"""What happens between steps: log, evaluate, checkpoint, stop. Hooks look at the run; they do not touch weights or data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.evaluation.loss import StoppedError
from ftcli.files import json_text, said_when_disk_is_full
from ftcli.training.manifest import memory_in_use

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftcli.recipe.train import EarlyStopping, Every
    from ftcli.training.batches import StepBatches
    from ftcli.training.checkpoint import Checkpoints
    from ftcli.training.loop import Progress
    from ftcli.training.signals import StopSignal
    from ftcli.training.step import Learner, StepResult


@dataclass(slots=True)
class Metrics:
    """metrics.jsonl of a run, and the trackers beside it; only the main process writes."""

    path: Path
    accelerator: Accelerator

    def cut(self, num_bytes: int) -> None:
        """Forget what a run that was killed had written after its last checkpoint."""
        if self.accelerator.is_main_process and self.path.exists():
            os.truncate(self.path, min(num_bytes, self.path.stat().st_size))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        if self.accelerator.is_main_process:
            with said_when_disk_is_full(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(record) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(_flat(record), step=record["step"])

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a record under slashed names, as trackers take them."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "step":
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass(slots=True)
class Log:
    """One record every so many steps: the mean since the last one."""

    every: int
    metrics: Metrics
    source_names: Sequence[str]
    lr: float
    factor_at: Callable[[int, int], float]
    show: Callable[[dict[str, Any]], None]
    seconds: float = 0.0
    """Of the run at the last step."""

    def after_step(self, progress: Progress, batches: StepBatches, result: StepResult) -> None:
        seconds, self.seconds = progress.seconds - self.seconds, progress.seconds
        for name, (loss_sum, weight) in zip(self.source_names, result.source_sums.tolist(), strict=True):
            _add(progress.pending, f"source/{name}", loss_sum, weight)
        for name, tokens in zip(self.source_names, batches.source_tokens, strict=True):
            _add(progress.pending, f"tokens/{name}", tokens, 0.0)
        for name, value in result.regularizers.items():
            _add(progress.pending, f"regularizer/{name}", value, 1)
        _add(progress.pending, "rates", batches.num_targets, seconds)
        if progress.step % self.every and not progress.is_last and progress.step != 1:
            return
        record = self.record(progress, batches, result)
        self.metrics.write(record)
        progress.pending = {}
        seconds_a_step = progress.seconds / progress.step
        self.show({**record, "num_steps": progress.num_steps, "seconds_left": seconds_a_step * (progress.num_steps - progress.step)})

    def record(self, progress: Progress, batches: StepBatches, result: StepResult) -> dict[str, Any]:
        sums = {name: progress.pending[f"source/{name}"] for name in self.source_names}
        losses = {name: loss_sum / weight for name, (loss_sum, weight) in sums.items() if weight > 0}
        targets, seconds = progress.pending["rates"]
        record = {
            "kind": "train",
            "step": progress.step,
            "loss": sum(loss_sum for loss_sum, _ in sums.values()) / sum(weight for _, weight in sums.values()),
            "lr": self.lr * self.factor_at(progress.step, progress.num_steps),
            "grad_norm": result.grad_norm,
            "target_tokens_per_second": targets / seconds if seconds > 0 else None,
            "memory_bytes": memory_in_use(),
            "tokens": progress.tokens,
            "targets": progress.targets,
            "sources": losses,
            "source_tokens": {name: int(progress.pending[f"tokens/{name}"][0]) for name in self.source_names},
            "batch_hash": progress.batch_chain,
            "seconds": round(progress.seconds, 3),
        }
        sums = {key.removeprefix("regularizer/"): pair for key, pair in progress.pending.items() if key.startswith("regularizer/")}
        held = {name: total / count for name, (total, count) in sums.items()}
        return {**record, "regularizers": held} if held else record


def _add(sums: dict[str, list[float]], name: str, first: float, second: float) -> None:
    old = sums.get(name, [0.0, 0.0])
    sums[name] = [old[0] + first, old[1] + second]


@dataclass(slots=True)
class Evaluate:
    """Measures the evaluation sources, keeps the best step in mind, and ends the run when there is no gain any more."""

    every: int | None
    measure: Callable[[int], dict[str, dict[str, Any]]]
    """Step -> what each source measures."""
    metrics: Metrics
    early_stopping: EarlyStopping | None
    show: Callable[[dict[str, Any]], None]
    first: int = 0
    """The step at which the run begins: a branch does not begin at 0."""

    def after_step(self, progress: Progress, batches: StepBatches, result: StepResult) -> None:
        self.act(progress)

    def act(self, progress: Progress) -> None:
        """Evaluate if it is due and not yet done; a stop that is asked for meanwhile leaves it for the resumed run."""
        is_due = progress.step == self.first or progress.is_last or (self.every is not None and progress.step % self.every == 0)
        if not is_due or progress.evaluated_step == progress.step:
            return
        try:
            sources = self.measure(progress.step)
        except StoppedError:
            return
        record = {"kind": "evaluate", "step": progress.step, "sources": sources}
        progress.evaluated_step = progress.step
        self.metrics.write(record)
        self.show({**record, "num_steps": progress.num_steps})
        self.judge(progress, sources)

    def judge(self, progress: Progress, sources: dict[str, dict[str, Any]]) -> None:
        """The best step is the one of lowest loss over the sources that are no retained ones; where the run began does not compete."""
        judged = [values for values in sources.values() if values["role"] == "target"] or list(sources.values())
        if progress.step == self.first or not judged:
            return
        targets = sum(values["targets"] for values in judged)
        loss = sum(values["loss"] * values["targets"] for values in judged) / targets
        least = self.early_stopping.min_improvement if self.early_stopping is not None else 0.0
        if progress.best_loss is None or loss < progress.best_loss - least:
            progress.best_step, progress.best_loss, progress.evaluations_without_gain = progress.step, loss, 0
            return
        progress.evaluations_without_gain += 1
        if self.early_stopping is not None and progress.evaluations_without_gain >= self.early_stopping.patience:
            progress.stop_reason = f"no gain in {progress.evaluations_without_gain} evaluations; the best step is {progress.best_step}"


@dataclass(slots=True)
class Checkpoint:
    """Saves every so many steps, at the best step, at the last one, and when a stop is asked for."""

    every: int
    checkpoints: Checkpoints
    learner: Learner
    metrics: Metrics
    stop: StopSignal
    saved_step: int = -1

    def after_step(self, progress: Progress, batches: StepBatches, result: StepResult) -> None:
        is_stopping = self.stop.is_agreed(self.learner.accelerator)
        is_due = progress.step % self.every == 0 or progress.is_last or progress.stop_reason is not None
        if is_due or is_stopping or progress.best_step == progress.step:
            self.save(progress)
        if is_stopping:
            progress.stop_reason = "interrupted"

    def save(self, progress: Progress) -> None:
        """Save the last finished step, once."""
        accelerator = self.learner.accelerator
        if accelerator.is_main_process and self.saved_step != progress.step:
            progress.metrics_bytes = self.metrics.size()
            self.checkpoints.save(self.learner, progress)
        self.saved_step = progress.step
        accelerator.wait_for_everyone()


def default_save_every(every: Every, num_steps: int) -> int:
    """Steps between checkpoints: a tenth of the run, at least 50."""
    return every.save if every.save is not None else max(50, num_steps // 10)
