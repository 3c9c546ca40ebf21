"""What a model kept while it learnt one thing after the other: from a matrix of stages and tasks to a few numbers.

``R[t][i]`` is how well the model does on task ``i`` after stage ``t``, more being better; None where it was not measured. Stage 0 is the
model before all of them. ``learnt_at[i]`` is the stage that trained task ``i``, 0 for what the model could do before.

    average             mean over i of R[T][i]
    backward transfer   mean over tasks learnt before T of R[T][i] - R[learnt_at[i]][i]      below 0: later stages cost it
    forgetting          mean over tasks learnt before T of max over t in learnt_at[i]..T-1 of R[t][i], minus R[T][i]
    forward transfer    mean over tasks learnt after stage 1 of R[learnt_at[i] - 1][i] - R[0][i]

Sources: Lopez-Paz & Ranzato 2017, arXiv:1706.08840, section 2 (average, backward and forward transfer; their random model is stage 0
here); Chaudhry et al. 2018, arXiv:1801.10112, section 3 (forgetting; their maximum is over all earlier stages, here over those since the
task was learnt, so that nothing counts as forgotten before it was known).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class TaskHistory:
    """One task over the stages."""

    learnt_at: int
    first: float | None
    """Right after it was learnt."""
    best: float | None
    """Since then, before the last stage."""
    last: float | None

    @property
    def backward_transfer(self) -> float | None:
        return None if self.first is None or self.last is None else self.last - self.first

    @property
    def forgetting(self) -> float | None:
        return None if self.best is None or self.last is None else self.best - self.last


@dataclass(frozen=True, slots=True)
class Retention:
    """All tasks over the stages; None where nothing that it needs was measured."""

    average: float | None
    backward_transfer: float | None
    forgetting: float | None
    forward_transfer: float | None
    tasks: tuple[TaskHistory, ...]


def retention(matrix: Matrix, learnt_at: Sequence[int]) -> Retention:
    """The measures of a matrix.

    Args:
        matrix: ``(T + 1, N)`` stages and tasks, stage 0 the model before them (all None where it was not measured).
        learnt_at: ``(N,)`` of 0..T.

    Raises:
        ValueError: the matrix is not as wide as there are tasks, or a task was learnt at no stage of it.

    Example:
        >>> found = retention([[None, None], [0.9, 0.2], [0.6, 0.8]], [1, 2])
        >>> round(found.average, 2), round(found.backward_transfer, 2), round(found.forgetting, 2)
        (0.7, -0.3, 0.3)
    """
    last = len(matrix) - 1
    if any(len(row) != len(learnt_at) for row in matrix) or not matrix:
        raise ValueError(f"a matrix of {len(learnt_at)} tasks has as many columns")
    if any(not 0 <= stage <= last for stage in learnt_at):
        raise ValueError(f"stages are 0 to {last}, not {list(learnt_at)}")
    tasks = tuple(_history(matrix, index, stage) for index, stage in enumerate(learnt_at))
    earlier = [task for task in tasks if task.learnt_at < last]
    forward = [_difference(matrix[stage - 1][index], matrix[0][index]) for index, stage in enumerate(learnt_at) if stage > 1]
    return Retention(
        average=_mean([task.last for task in tasks]),
        backward_transfer=_mean([task.backward_transfer for task in earlier]),
        forgetting=_mean([task.forgetting for task in earlier]),
        forward_transfer=_mean(forward),
        tasks=tasks,
    )


def _history(matrix: Matrix, index: int, learnt_at: int) -> TaskHistory:
    last = len(matrix) - 1
    since = [value for row in matrix[learnt_at:last] if (value := row[index]) is not None]
    return TaskHistory(learnt_at, matrix[learnt_at][index], max(since, default=None), matrix[last][index])


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
