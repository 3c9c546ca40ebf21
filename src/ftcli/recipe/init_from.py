"""What a recipe may say under `init_from`."""

from __future__ import annotations

from typing import Literal

from ftcli.spec import LocalPath, Spec


class InitFrom(Spec):
    """Begin a new run where another one ended: its weights, and nothing of its optimizer, its data or its steps."""

    path: LocalPath
    """A run folder, its `adapter` or `model`, one of its checkpoints, or a folder with an adapter in PEFT's layout."""
    adapter: Literal["keep", "stack"] = "keep"
    """`keep` goes on training the adapter; `stack` freezes it and trains another beside it, saved together as one (LoRA only)."""
