"""What a recipe may say under `init_from`."""

from __future__ import annotations

from typing import Literal

from ftcli.spec import LocalPath, Spec


class InitFrom(Spec):
    """Begin a new run where another one ended: its weights, and, unless it `continues`, nothing of its optimizer or its steps."""

    path: LocalPath
    """A run folder, its `adapter` or `model`, one of its checkpoints, or a folder with an adapter in PEFT's layout."""
    adapter: Literal["keep", "stack"] = "keep"
    """`keep` goes on training the adapter; `stack` freezes it and trains another beside it, saved together as one (LoRA only)."""
    continues: bool = False
    """Take a checkpoint's optimizer and step count, too: a branch that goes on from there to `train.steps`, counted from the first
    run's beginning, with another schedule or other data. Off the constant part of an `infinite` schedule it anneals without a jump."""
