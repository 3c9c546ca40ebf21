"""The peak learning rate to the end."""

from __future__ import annotations

from typing import Literal

from ftcli.optim.schedules.warmup import Warmup


class Constant(Warmup):
    """Warm-up, then the peak to the last step."""

    kind: Literal["constant"] = "constant"

    def factor_at(self, step: int, num_steps: int) -> float:
        """Factor of the peak learning rate at `step`, counted from 1."""
        return min(1.0, step / self.peak_step(num_steps))
