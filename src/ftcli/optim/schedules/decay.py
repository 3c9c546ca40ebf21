"""Ways down from the peak."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["linear", "cosine", "sqrt"]


def decayed(steps_down: int, num_steps_down: int, shape: Shape, min_lr_ratio: float) -> float:
    """Factor of the peak learning rate after `steps_down` of `num_steps_down` steps of decay; past the end it stays at the end.

    `sqrt` is 1 - sqrt(progress): steep at first, flat at the end (Hägele et al. 2024, arXiv:2405.18392).

    Example:
        >>> [round(decayed(1, 4, shape, 0.0), 3) for shape in ("linear", "cosine", "sqrt")]
        [0.75, 0.854, 0.5]
    """
    progress = min(1.0, steps_down / num_steps_down) if num_steps_down > 0 else 1.0
    match shape:
        case "linear":
            height = 1.0 - progress
        case "cosine":
            height = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "sqrt":
            height = 1.0 - math.sqrt(progress)
    return min_lr_ratio + (1.0 - min_lr_ratio) * height
