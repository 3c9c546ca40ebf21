"""SIGTERM and Ctrl-C ask a run to stop: it finishes the step it is in, saves all it needs, and exits with code 75."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from ftcli.errors import InterruptedRun

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Whether a stop was asked for. Before training it stops at once; a second Ctrl-C always does."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_training = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.is_training:
            raise InterruptedRun(f"stopped by {name} outside training; what was finished is kept", hint="the same command goes on with it")
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = name

    def is_set(self) -> bool:
        return self.name is not None

    def is_agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all processes must call this, and all get the same answer."""
        if accelerator.num_processes == 1:
            return self.is_set()
        import torch

        return bool(accelerator.reduce(torch.tensor(int(self.is_set()), device=accelerator.device)).item())

    @contextmanager
    def installed(self) -> Iterator[StopSignal]:
        """Listen to the signals inside the block, and put the handlers back after it."""
        import threading

        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
