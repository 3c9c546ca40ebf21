"""Constants of measurement, and numbers as people read them."""

from __future__ import annotations

import math

KIB, MIB, GIB = 2**10, 2**20, 2**30
NATS_PER_BIT = math.log(2.0)


def bits_per_byte(loss_sum: float, num_bytes: int) -> float:
    """Bits needed per byte of text: comparable between tokenizers. NaN where there is no text.

    Args:
        loss_sum: nats, summed over targets, unweighted.
        num_bytes: UTF-8 bytes of the text of those targets.
    """
    return loss_sum / NATS_PER_BIT / num_bytes if num_bytes else math.nan


def perplexity(loss: float) -> float:
    """exp(loss), infinity instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def format_bytes(num_bytes: float) -> str:
    """
    Example:
        >>> format_bytes(1536), format_bytes(12), format_bytes(3 * 2**30)
        ('1.5 KiB', '12 B', '3.0 GiB')
    """
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(count: float) -> str:
    """
    Example:
        >>> format_count(950), format_count(12_300), format_count(7_000_000)
        ('950', '12.3k', '7.0M')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """
    Example:
        >>> format_seconds(4.2), format_seconds(75), format_seconds(7380)
        ('4.2 s', '1 min 15 s', '2 h 03 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
