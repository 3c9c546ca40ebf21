"""A cosine several times over, each time warmed up again."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftcli.optim.schedules.decay import decayed
from ftcli.optim.schedules.warmup import Warmup


class Rewarm(Warmup):
    """Cycles of equal length: each climbs from where the last one ended to its peak and decays again, half a cosine down.

    The first climbs from `start_ratio`, where the run before this one may have ended. Re-warming lets the model take in new data,
    and forgets more the higher it climbs; re-decaying takes the gain home. Warm-up lengths are those of one cycle.

    Source: Gupta et al. 2023, arXiv:2308.04014, and Ibrahim et al. 2024, arXiv:2403.08763, section 6.1 (re-warming and re-decaying);
    Loshchilov and Hutter 2016, arXiv:1608.03983 (restarts).
    """

    kind: Literal["rewarm"] = "rewarm"
    cycles: int = Field(default=2, ge=1)
    """How often it warms up and decays."""
    start_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate before the first step, as a share of the peak."""
    peak_ratio: float = Field(default=1.0, gt=0, le=1)
    """Peak of each cycle as a share of the one before it; a smaller value forgets less."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of each cycle, as a share of the first peak; no cycle ends above its own peak."""

    def factor_at(self, step: int, num_steps: int) -> float:
        """Factor of the first peak's learning rate at `step`, counted from 1.

        Example:
            >>> schedule = Rewarm(warmup_steps=2, min_lr_ratio=0.2, peak_ratio=0.6)
            >>> [round(schedule.factor_at(step, 8), 2) for step in range(1, 9)]
            [0.5, 1.0, 0.6, 0.2, 0.4, 0.6, 0.4, 0.2]
        """
        step = min(step, num_steps)
        cycle = ((step - 1) * self.cycles) // num_steps
        # the first step of a cycle is the smallest that the line above gives it
        first, following = (-(-number * num_steps // self.cycles) + 1 for number in (cycle, cycle + 1))
        length, place = following - first, step - first + 1
        top = self.peak_ratio**cycle
        bottom = min(self.min_lr_ratio, top)
        begin = self.start_ratio if cycle == 0 else min(self.min_lr_ratio, self.peak_ratio ** (cycle - 1))
        peak = self.peak_step(length)
        if place <= peak:
            return begin + (top - begin) * place / peak
        return bottom + (top - bottom) * decayed(place - peak, length - peak, "cosine", 0.0)
