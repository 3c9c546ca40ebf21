"""One seed a run; every use derives its own, so that no use disturbs another."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose (and step, process, ...) of a run.

    Example:
        >>> derive_seed(17, "dropout", 3) == derive_seed(17, "dropout", 3) != derive_seed(17, "dropout", 4)
        True
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_torch(seed: int, *purpose: str | int) -> None:
    """Seed torch on every device for one purpose."""
    import torch

    torch.manual_seed(derive_seed(seed, *purpose))
