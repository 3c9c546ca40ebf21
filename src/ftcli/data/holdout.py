"""A source divided into rows to train on and rows held out, by the content of each row.

The rows with the smallest hashes are held out: so the division does not depend on their order, and equal rows stay together.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_ROWS = 1000
ROWS_FOR_ONE = 20  # a source with so many rows has at least one held out


def row_hash(row: dict[str, Any]) -> int:
    """A 64-bit number that depends on the row's content only.

    Example:
        >>> row_hash({"a": 1, "b": "x"}) == row_hash({"b": "x", "a": 1})
        True
    """
    text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def holdout_limit(hashes: NDArray[np.uint64], share: float) -> int:
    """The row hash below which rows are held out: about `share` of the rows, at most 1000, 0 where nothing can be held out.

    Equal rows have equal hashes, so copies go to the same side, and the share is met as nearly as they allow.

    Args:
        hashes: (rows,) of all rows.
    """
    if len(hashes) == 0 or share == 0:
        return 0
    wanted = min(MAX_ROWS, max(int(share * len(hashes)), int(len(hashes) >= ROWS_FOR_ONE)))
    if wanted == 0 or wanted >= len(hashes):
        return 0
    ordered = np.sort(hashes)
    if ordered[0] < ordered[wanted]:
        return int(ordered[wanted])
    num_copies = int(np.searchsorted(ordered, ordered[0], side="right"))
    return int(ordered[num_copies]) if num_copies <= min(MAX_ROWS, len(ordered) // 2) else 0


@dataclass(frozen=True)
class HeldOut:
    """The rows that are held out of the first so many rows of a source, and every later row that is equal to one of them."""

    places: frozenset[int]
    """Their indices among the first `num_rows`."""
    hashes: frozenset[int]
    num_rows: int

    def has(self, index: int, row: dict[str, Any]) -> bool:
        """Whether the row at `index` of the source is held out. A later one is not for its small hash alone."""
        return index in self.places if index < self.num_rows else row_hash(row) in self.hashes


def held_out(rows: Iterable[dict[str, Any]], share: float) -> HeldOut:
    """What is held out of `rows`, which are read once: 8 bytes of each are kept meanwhile."""
    hashes = np.frombuffer(array("Q", (row_hash(row) for row in rows)), dtype=np.uint64)
    places = np.flatnonzero(hashes < np.uint64(holdout_limit(hashes, share)))
    return HeldOut(frozenset(places.tolist()), frozenset(hashes[places].tolist()), len(hashes))
