"""A straight line down."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftcli.optim.schedules.decay import decayed
from ftcli.optim.schedules.warmup import Warmup


class Linear(Warmup):
    """Warm-up, then a straight line from the peak to `min_lr_ratio` of it at the last step."""

    kind: Literal["linear"] = "linear"
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step, as a share of the peak; at 0 the last step moves nothing."""

    def factor_at(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rate at `step`, counted from 1."""
        peak = self.peak_step(num_steps)
        if step <= peak:
            return step / peak
        return decayed(step - peak, num_steps - peak, "linear", self.min_lr_ratio)
