"""A learning rate from a range test: the rate rises from step to step until the loss goes up, and nothing of it is kept.

Batches differ, and a hard one looks like a rate that is too high. So each step's loss is compared with what the same batch costs the
model as it began, and the curve is of that difference.

Source: Smith 2015, arXiv:1506.01186, section 3.3 (the range test); an exponential rise, the steepest descent of the smoothed loss and
a tenth of the rate at which it goes up again are what practice has made of it (Howard and Gugger 2020, arXiv:2002.04688, section 4.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ftcli.errors import RequestError, RunError
from ftcli.reporting.plot import smoothed
from ftcli.training.assemble import assemble_data, assemble_learner, assemble_model, featured, make_accelerator, model_width, settled
from ftcli.training.step import NonFiniteError, optimizer_step

if TYPE_CHECKING:
    from ftcli.data.prepare import Progress
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.batches import BatchSource
    from ftcli.training.step import Learner

# Rates from a thousandth to a thousand times the method's default: wherever the best one is, both its sides are seen.
RANGE_RATIO = 1000.0
# A mean over the last ten steps or so tells a loss that goes up from one batch that is hard.
RECENT_DECAY = 0.9
UP_RATIO = 2.0
ABOVE_FIRST_RATIO = 1.2
FEWEST_STEPS = 10
SAFETY = 10.0


@dataclass(frozen=True)
class RateCurve:
    """The loss at each learning rate, and what follows from it."""

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    """Nats per target of each step, before its update, less what its batch has above the mean for the untrained model."""
    smoothed: tuple[float, ...]
    """The same as a mean with its neighbours."""
    suggestion: float | None
    """The steepest rate, or a tenth of the diverging one, if that is less; None where the loss falls nowhere."""
    steepest: float | None
    """Where the smoothed loss falls fastest with the logarithm of the rate."""
    lowest: float | None
    """Where the smoothed loss is least."""
    diverges: float | None
    """Beyond the lowest, the first rate at which the smoothed loss is above the first one; None where it never was."""
    default_lr: float
    """What a run takes without `train.lr`."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_lr(
    recipe: Recipe, progress: Progress | None, *, lowest: float | None = None, highest: float | None = None, num_steps: int = 100
) -> RateCurve:
    """Train for so many steps at rising learning rates, in memory alone.

    Args:
        lowest: rate of the first step; a thousandth of the method's default if None.
        highest: rate of the last step; a thousand times that default if None. It ends before where the loss goes up for good.

    Raises:
        RequestError: anything that would stop the run itself.
    """
    train = recipe.train.model_copy(update={"epochs": None, "max_tokens": None, "steps": num_steps})
    recipe = recipe.model_copy(update={"train": train, "trackers": ()})
    accelerator = make_accelerator(recipe, None)
    data = assemble_data(recipe, progress)
    recipe = settled(recipe, data)
    parts = assemble_model(recipe, data, accelerator)
    data = featured(recipe, data, parts, progress)
    default_lr = recipe.method.lr_at(model_width(parts.module))
    first, last = lowest or default_lr / RANGE_RATIO, highest or default_lr * RANGE_RATIO
    if last <= first:
        raise RequestError(f"--to: found {last:g}, allowed: above `--from` ({first:g})")
    learner, batches = assemble_learner(recipe, data, replace(parts, lr=last), accelerator)
    before = untrained_losses(learner, batches, num_steps, progress)
    mean = sum(before) / len(before)
    learner.model.train()
    lrs: list[float] = []
    losses: list[float] = []
    stop = _Rise()
    for step, lr in enumerate(rising(first, last, num_steps), start=1):
        try:
            losses.append(optimizer_step(learner, batches.at(step), lr / last).loss - before[step - 1] + mean)
        except NonFiniteError:
            break
        lrs.append(lr)
        if progress is not None:
            progress.update(step, num_steps, f"lr {lr:.1e}, loss {losses[-1]:.3f}")
        if stop.goes_up(losses[-1]):
            break
    return judged(lrs, losses, default_lr, ended_early=len(lrs) < num_steps)


def untrained_losses(learner: Learner, batches: BatchSource, num_steps: int, progress: Progress | None) -> list[float]:
    """Nats per target of each step's batches, for the model as it is."""
    import torch

    accelerator, losses = learner.accelerator, []
    learner.model.eval()
    for step in range(1, num_steps + 1):
        of_step, total = batches.at(step), torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for batch in of_step.micro_batches:
            moved = batch.to(accelerator.device)
            with torch.no_grad():
                found = learner.objective.losses(learner.model(moved), moved)
            total += (found.values * found.weights).sum()
        losses.append(float(accelerator.reduce(total)) / of_step.normaliser)
        if progress is not None:
            progress.update(step, num_steps, "losses before training")
    return losses


def rising(first: float, last: float, count: int) -> list[float]:
    """`count` rates from `first` to `last`, each the same factor above the one before.

    Example:
        >>> [f"{lr:.0e}" for lr in rising(1e-4, 1e-1, 4)]
        ['1e-04', '1e-03', '1e-02', '1e-01']
    """
    return [first * (last / first) ** (number / max(1, count - 1)) for number in range(count)]


class _Rise:
    """Tells when a loss has gone up for good."""

    def __init__(self) -> None:
        self.total = self.weight = 0.0
        self.count = 0
        self.least = self.first = math.inf

    def goes_up(self, loss: float) -> bool:
        """Whether the recent mean, with this loss, is twice the least one and above the first."""
        self.total, self.weight = RECENT_DECAY * self.total + loss, RECENT_DECAY * self.weight + 1
        recent, self.count = self.total / self.weight, self.count + 1
        self.first = loss if self.count == 1 else self.first
        self.least = min(self.least, recent)
        return self.count >= FEWEST_STEPS and recent > max(UP_RATIO * self.least, ABOVE_FIRST_RATIO * self.first)


def judged(lrs: Sequence[float], losses: Sequence[float], default_lr: float, *, ended_early: bool) -> RateCurve:
    """What the losses say.

    Args:
        ended_early: the loss went up for good, or was no number any more.

    Raises:
        RunError: there is too little to judge.
    """
    if len(losses) < FEWEST_STEPS:
        what = (
            f"the loss was no finite number after {len(losses)} steps, at a learning rate of {lrs[-1]:.1e}" if lrs else "no step went well"
        )
        raise RunError(what, hint="a lower `--from`")
    means = smoothed(losses, max(1.0, len(losses) / 30))
    lowest = min(range(len(means)), key=means.__getitem__)
    above = [index for index in range(lowest, len(means)) if means[index] > means[0]]
    diverges = lrs[above[0]] if above else lrs[-1] if ended_early else None
    steepest, suggestion = None, None
    slopes = [(means[index + 1] - means[index - 1]) / math.log(lrs[index + 1] / lrs[index - 1]) for index in range(1, lowest)]
    if slopes and min(slopes) < 0:
        steepest = lrs[1 + min(range(len(slopes)), key=slopes.__getitem__)]
        suggestion = steepest if diverges is None else min(steepest, diverges / SAFETY)
    return RateCurve(
        lrs=tuple(lrs),
        losses=tuple(losses),
        smoothed=tuple(means),
        suggestion=suggestion,
        steepest=steepest,
        lowest=lrs[lowest] if steepest is not None else None,
        diverges=diverges,
        default_lr=default_lr,
    )
