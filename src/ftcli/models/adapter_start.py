"""Starts of a LoRA adapter that PEFT takes off the base whenever it loads one: on the plain base it adds s B A less its start.

PEFT notes in `adapter_config.json` how A and B began (`init_lora_weights`). Some of these starts change the base: what is trained is then
W - s B0 A0 + s B A, and the file holds B and A alone. PiSSA and OLoRA depend on W alone and are computed again; others cannot be.
Sources: Meng et al. 2024, arXiv:2404.02948 (PiSSA); Büyükakyüz 2024, arXiv:2406.01775 (OLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Start = Literal["pissa", "olora"]
HINT = "have PEFT convert it where it was trained (`path_initial_model_for_weight_conversion`), or merge it there and name that model"
_LEAVES_BASE = ("gaussian", "eva", "orthogonal", "mica")
_LOST = {
    "pissa_niter_": "PEFT draws its start at random, anew whenever it loads the adapter",
    "corda": "its start was made of data, and was taken off the base",
    "lora_ga": "its start was made of gradients, and was taken off the base",
    "loftq": "it was trained on a quantised base less its start",
}


def start_of(config: Mapping[str, Any]) -> Start | None:
    """The start that is taken off the base, from an adapter's configuration; None where the base stays as it is."""
    name = str(config.get("init_lora_weights")).lower()
    return cast("Start", name) if name in ("pissa", "olora") else None


def lost_start(config: Mapping[str, Any]) -> str | None:
    """Why nobody knows what the adapter is on the plain base, in words; None where it is known."""
    value = config.get("init_lora_weights")
    name = str(value).lower()
    if value is None or isinstance(value, bool) or name in _LEAVES_BASE or start_of(config) is not None:
        return None
    why = next((why for first, why in _LOST.items() if name.startswith(first)), "ftcli does not know what it does to the base")
    return f"`init_lora_weights: {value}`: {why}"


def start_factors(start: Start, weight: NDArray[Any], rank: int, scaling: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """``(rows, rank)`` and ``(rank, columns)``: the product of the two is what PEFT takes off a weight.

    Args:
        weight: ``(rows, columns)`` as the base stores it; PEFT does not turn Conv1D's for OLoRA, and for PiSSA it makes no difference.
        scaling: s of the adapter. PiSSA takes the leading part of W whatever it is, OLoRA s times the first `rank` columns of Q R.
    """
    import numpy as np

    wide = weight.astype(np.float64)
    if start == "olora":
        q, r = np.linalg.qr(wide)
        left, right = q[:, :rank] * scaling, r[:rank]
    elif wide.shape[0] < wide.shape[1]:
        left = np.linalg.eigh(wide @ wide.T)[1][:, -rank:]
        right = left.T @ wide
    else:
        right = np.linalg.eigh(wide.T @ wide)[1][:, -rank:].T
        left = wide @ right.T
    return np.ascontiguousarray(left, np.float32), np.ascontiguousarray(right, np.float32)
