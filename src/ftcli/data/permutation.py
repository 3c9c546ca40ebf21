"""A random order of n things of which any place can be asked for at once: no list is kept, whatever n is."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6  # four suffice for large n; small halves of one or two bits mix slowly


def key_of(*parts: int | str) -> int:
    """A 64-bit number that depends on all `parts` and nothing else.

    Example:
        >>> key_of(17, "epoch", 0) == key_of(17, "epoch", 0), key_of(17, "epoch", 0) == key_of(17, "epoch", 1)
        (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(places: NDArray[np.uint64], size: int, key: tuple[int | str, ...]) -> NDArray[np.int64]:
    """What stands at each of `places` in the order of 0..size-1 that `key` names: each number exactly once over all places.

    Args:
        places: ``(n,)`` uint64, each below `size`.
        size: how many things are ordered; at least 1.

    Returns:
        ``(n,)`` int64.

    Example:
        >>> sorted(permute(np.arange(5, dtype=np.uint64), 5, (17, "pass", 0)).tolist())
        [0, 1, 2, 3, 4]

    Source: a balanced Feistel network (Luby and Rackoff 1988) on the next power of four, walking its cycles until the result
    is below `size` (Black and Rogaway 2002, section 3).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = [np.uint64(key_of(*key, number)) for number in range(ROUNDS)]
    result = _feistel(places.astype(np.uint64), half, keys)
    while (outside := result >= np.uint64(size)).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(numbers: NDArray[np.uint64], half: np.uint64, keys: list[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the numbers of 2 * `half` bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of 64 bits to 64 bits in which every input bit matters to every output bit.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
