"""Near copies among the rows that a selection would take: the better of two stays.

Read are the candidates alone, some more than are wanted, so that the places of those left out can be filled; kept of each are its
MinHash minima, 400 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ftcli.data.leakage import NUM_PERMUTATIONS
from ftcli.data.stats.near import minima_of, near_an_earlier

if TYPE_CHECKING:
    from ftcli.data.select.best import Candidate
    from ftcli.data.select.pool import Pool
    from ftcli.data.select.way import Tell

ROWS_AT_ONCE = 1000


def near_copies(pool: Pool, candidates: Sequence[Candidate], min_near: float, tell: Tell) -> frozenset[int]:
    """Digests of the candidates that are near a better one.

    Args:
        candidates: best first.
        min_near: share of common character n-grams, as MinHash estimates it, from which two rows are near copies.
    """
    places = {candidate.index: place for place, candidate in enumerate(candidates)}
    table = np.zeros((len(candidates), NUM_PERMUTATIONS), dtype=np.uint32)
    waiting: list[tuple[int, str]] = []

    def keep() -> None:
        if waiting:
            table[[place for place, _ in waiting]] = minima_of([text for _, text in waiting])
            waiting.clear()

    for done, row in enumerate(pool.chosen(sorted(places)), start=1):
        waiting.append((places[row.index], row.text))
        if len(waiting) == ROWS_AT_ONCE:
            keep()
            tell(done, "look for near copies")
    keep()
    return frozenset(candidates[place].digest for place in np.flatnonzero(near_an_earlier(table, min_near)).tolist())
