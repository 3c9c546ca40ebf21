"""Warm-up, cool-down to a constant that can go on for ever, and an anneal that may branch off it at any step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from ftcli.optim.schedules.decay import decayed
from ftcli.optim.schedules.warmup import Warmup, steps_of


class Infinite(Warmup):
    """Warm-up, half a cosine down to a constant, the constant, and an anneal over the last steps.

    Nothing before the anneal depends on how long the run is if its lengths are given in steps: a run with `anneal_steps: 0` is a
    trunk, and a run that begins from one of its checkpoints with `begin: constant` is a branch, which anneals, or goes on with new
    data without another warm-up. For pre-training that is to be continued again and again; a single run does as well with `cosine`.

    Source: Ibrahim et al. 2024, arXiv:2403.08763, section 7.4, whose constant is 0.55 and whose end is 0.1 of the peak.
    """

    kind: Literal["infinite"] = "infinite"
    begin: Literal["warmup", "constant"] = "warmup"
    """`constant` leaves out warm-up and cool-down: a branch of a run that had them."""
    cooldown_steps: int | None = Field(default=None, ge=0)
    """Steps from the peak down to the constant; at 0 it is there at once. Instead of `cooldown_ratio`."""
    cooldown_ratio: float | None = Field(default=None, ge=0, le=1)
    """The same as a share of all steps, in 0..1, rounded up to a whole step; 0.2 if neither is given."""
    constant_ratio: float = Field(default=0.55, gt=0, le=1)
    """The constant as a share of the peak; a larger value adapts faster and forgets more."""
    anneal_steps: int | None = Field(default=None, ge=0)
    """Steps of the anneal, of a branch no more than its own; at 0 there is none, and the constant goes on to the last step. Instead of
    `anneal_ratio`."""
    anneal_ratio: float | None = Field(default=None, ge=0, le=1)
    """The same as a share of all steps, in 0..1, rounded up to a whole step; 0.2 if neither is given."""
    anneal: Literal["exponential", "linear"] = "exponential"
    """How it falls at the end: by the same factor every step, or by the same amount."""
    min_lr_ratio: float = Field(default=0.1, gt=0, le=1)
    """Learning rate of the last step of the anneal, as a share of the peak; at most `constant_ratio`."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Infinite:
        for part in ("cooldown", "anneal"):
            if getattr(self, f"{part}_steps") is not None and getattr(self, f"{part}_ratio") is not None:
                raise ValueError(f"`{part}_steps` and `{part}_ratio` say the same thing twice, give one")
        if self.min_lr_ratio > self.constant_ratio:
            raise ValueError(f"`min_lr_ratio` ({self.min_lr_ratio:g}) is above `constant_ratio` ({self.constant_ratio:g})")
        unread = ("warmup_steps", "warmup_ratio", "cooldown_steps", "cooldown_ratio")
        if self.begin == "constant" and (given := [name for name in unread if getattr(self, name)]):
            raise ValueError(f"`{given[0]}` is not read with `begin: constant`, leave it out")
        return self

    def factor_at(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rate at `step`, counted from 1.

        Example:
            >>> schedule = Infinite(warmup_steps=2, cooldown_steps=2, constant_ratio=0.4, anneal_steps=2)
            >>> [round(schedule.factor_at(step, 8), 2) for step in range(1, 9)]
            [0.5, 1.0, 0.7, 0.4, 0.4, 0.4, 0.2, 0.1]
        """
        peak = 0 if self.begin == "constant" else self.peak_step(num_steps)
        last_hold = max(peak, num_steps - self._length(self.anneal_steps, self.anneal_ratio, num_steps))
        if step <= last_hold:
            return self._before_anneal(step, peak, num_steps)
        height, progress = self._before_anneal(last_hold, peak, num_steps), min(1.0, (step - last_hold) / (num_steps - last_hold))
        if self.anneal == "linear":
            return height + (self.min_lr_ratio - height) * progress
        return height * math.exp(progress * math.log(self.min_lr_ratio / height))

    def in_branch(self, begun: int, num_steps: int) -> Infinite:
        """The schedule of a branch that goes on behind step `begun`: what it anneals off is where its trunk stood.

        Example:
            >>> branch = Infinite(begin="constant", constant_ratio=0.4, anneal="linear").in_branch(18, 20)
            >>> [round(branch.factor_at(step, 20), 2) for step in (18, 19, 20)]
            [0.4, 0.25, 0.1]
        """
        length = self._length(self.anneal_steps, self.anneal_ratio, num_steps)
        return self.model_copy(update={"anneal_steps": min(length, num_steps - begun), "anneal_ratio": None})

    def _before_anneal(self, step: int, peak: int, num_steps: int) -> float:
        if step < peak:
            return step / peak
        if self.begin == "constant":
            return self.constant_ratio
        length = self._length(self.cooldown_steps, self.cooldown_ratio, num_steps)
        # without a cool-down the peak is one step long
        return 1.0 if step == peak else decayed(step - peak, length, "cosine", self.constant_ratio)

    @staticmethod
    def _length(steps: int | None, ratio: float | None, num_steps: int) -> int:
        return steps_of(steps, 0.2 if steps is None and ratio is None else ratio, num_steps)
