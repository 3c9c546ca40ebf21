"""Warm-up, hold, decay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ftcli.optim.schedules.decay import Shape, decayed
from ftcli.optim.schedules.warmup import Warmup, steps_of


class WSD(Warmup):
    """Warm-up, then the peak, then a decay over the last steps: where to stop can be decided late.

    The decay never begins before the warm-up ends.

    Source: Hu et al. 2024, arXiv:2404.06395, section 4; Hägele et al. 2024, arXiv:2405.18392.
    """

    kind: Literal["wsd"] = "wsd"
    decay_steps: int | None = Field(default=None, ge=0)
    """Steps of the decay; at 0 there is none. Instead of `decay_ratio`."""
    decay_ratio: float | None = Field(default=None, ge=0, le=1)
    """The same as a share of all steps, in 0..1, rounded up to a whole step; 0.2 if neither is given."""
    shape: Shape = "linear"
    """How it falls: `linear`, `cosine`, or `sqrt`, which falls fast at first and slowly at the end."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step, as a share of the peak; at 0 the last step moves nothing."""

    @model_validator(mode="after")
    def _one_decay(self) -> WSD:
        if self.decay_steps is not None and self.decay_ratio is not None:
            raise ValueError("`decay_steps` and `decay_ratio` say the same thing twice, give one")
        return self

    def factor_at(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rate at `step`, counted from 1."""
        peak = self.peak_step(num_steps)
        ratio = 0.2 if self.decay_steps is None and self.decay_ratio is None else self.decay_ratio
        last_hold = max(peak, num_steps - steps_of(self.decay_steps, ratio, num_steps))
        if step <= last_hold:
            return min(1.0, step / peak)
        return decayed(step - last_hold, num_steps - last_hold, self.shape, self.min_lr_ratio)
