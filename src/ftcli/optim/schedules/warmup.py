"""The warm-up that every schedule begins with, and the way down that most end with."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from ftcli.spec import Spec


class Warmup(Spec):
    """A linear climb: the learning rate at step s of a warm-up of n is s/n of the peak, so step n has the peak.

    A warm-up longer than the run is followed as it is written: the run then ends below the peak.
    """

    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps from 0 to the peak; a larger value starts more gently. 0 or 1 starts at the peak."""
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """The same as a share of all steps, in 0..1, rounded up to a whole step; instead of `warmup_steps`."""

    @model_validator(mode="after")
    def _one_length(self) -> Warmup:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("`warmup_steps` and `warmup_ratio` say the same thing twice, give one")
        return self

    def peak_step(self, num_steps: int) -> int:
        """The last step of the warm-up, 1 without one: the first step that has the peak learning rate."""
        return max(1, steps_of(self.warmup_steps, self.warmup_ratio, num_steps))


def steps_of(steps: int | None, ratio: float | None, num_steps: int) -> int:
    """A length given in steps or as a ratio of `num_steps`, in whole steps; 0 if neither is given.

    Example:
        >>> steps_of(None, 0.07, 100), steps_of(None, 0.1, 31), steps_of(5, None, 30), steps_of(None, None, 30)
        (7, 4, 5, 0)
    """
    if steps is not None:
        return steps
    # the small number keeps 0.07 * 100 = 7.000000000000001 from being rounded up to 8
    return math.ceil((ratio or 0.0) * num_steps - 1e-9)
