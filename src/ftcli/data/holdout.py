"""A source divided into rows to train on and rows held out, by the content of each row.

The rows with the smallest hashes are held out: so the division does not depend on their order, and equal rows stay together.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np

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


def holdout_limit(rows: Iterable[dict[str, Any]], share: float) -> int:
    """The row hash below which rows are held out: about `share` of the rows, at most 1000, 0 where nothing can be held out.

    Equal rows have equal hashes, so copies go to the same side, and the share is met as nearly as they allow.
    """
    hashes = np.sort(np.frombuffer(array("Q", (row_hash(row) for row in rows)), dtype=np.uint64))
    if len(hashes) == 0 or share == 0:
        return 0
    wanted = min(MAX_ROWS, max(int(share * len(hashes)), int(len(hashes) >= ROWS_FOR_ONE)))
    if wanted == 0 or wanted >= len(hashes):
        return 0
    if hashes[0] < hashes[wanted]:
        return int(hashes[wanted])
    num_copies = int(np.searchsorted(hashes, hashes[0], side="right"))
    return int(hashes[num_copies]) if num_copies <= min(MAX_ROWS, len(hashes) // 2) else 0


def held_out_hashes(rows: Callable[[], Iterable[dict[str, Any]]], share: float, of_rows: int | None = None) -> set[int]:
    """The hashes of the rows that are held out of the first `of_rows`; a later row that is none of these stays, however small its hash.

    Args:
        rows: gives all rows from the first one on, each time it is called.
    """
    limit = holdout_limit(islice(rows(), of_rows), share)
    return {number for row in islice(rows(), of_rows) if (number := row_hash(row)) < limit}
