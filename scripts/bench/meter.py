"""Time, processor time and memory of the timed steps of a worker, as one line of JSON. Imports nothing but the standard library."""

from __future__ import annotations

import json
import os
import resource
import time
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Counts from the end of the warm-up."""

    warm_up_steps: int
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    targets: int = 0
    began: tuple[float, float] = (0.0, 0.0)
    ended: tuple[float, float] = (0.0, 0.0)

    def after_step(self, step: int, tokens: int, targets: int) -> None:
        """Call at the end of `step`, which had so many real tokens and targets."""
        now = (time.perf_counter(), processor_seconds())
        if step == self.warm_up_steps:
            self.began = now
        elif step > self.warm_up_steps:
            self.ended = now
            self.tokens += tokens
            self.targets += targets

    def report(self, **more: object) -> None:
        """Print the result as the last line of standard output."""
        result = {
            "seconds": self.ended[0] - self.began[0],
            "processor_seconds": self.ended[1] - self.began[1],
            "tokens": self.tokens,
            "targets": self.targets,
            "losses": self.losses,
            "peak_bytes": peak_bytes(),
            **more,
        }
        print("RESULT " + json.dumps(result), flush=True)


def processor_seconds() -> float:
    """User and system time of all threads of this process so far."""
    times = os.times()
    return times.user + times.system


def peak_bytes() -> int:
    """Largest resident size of this process so far; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
