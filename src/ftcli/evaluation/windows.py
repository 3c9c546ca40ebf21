"""Long texts in windows that overlap, so that every token is predicted once, with as much before it as the stride leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ftcli.data.tree import SPAN, path_tree

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.data.tree import TokenTree

Window = tuple[int, int, int, int]
"""(text, start, first predicted, end)."""


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first predicted, end) of each window over a text: every token but the first is predicted once.

    Example:
        >>> windows(10, 6, 3)
        [(0, 1, 6), (3, 6, 9), (6, 9, 10)]
        >>> windows(6, 6, 3)
        [(0, 1, 6)]
    """
    found, start, done = [], 0, 1
    while done < length:
        end = min(start + window, length)
        found.append((start, done, end))
        start, done = start + stride, end
    return found


def in_micro_batches(
    encoded: Sequence[Sequence[int]], pieces: Sequence[Window], batch_tokens: int
) -> Iterator[tuple[NDArray[np.int64], list[TokenTree], list[NDArray[np.float32]]]]:
    """The text, the tree and the weights of every window in a micro-batch; a token before the first predicted weighs nothing."""
    import numpy as np

    from ftcli.layout.plan import plan_micro_batches

    plan = plan_micro_batches([end - start for _, start, _, end in pieces], 1, batch_tokens)[0] if pieces else []
    for part in plan:
        found = [pieces[index] for index in part]
        trees = [
            path_tree(np.array(encoded[row][start:end], dtype=np.int32), np.zeros(0, dtype=SPAN), 0, row) for row, start, _, end in found
        ]
        weights = [(np.arange(start, end) >= begin).astype(np.float32) for _, start, begin, end in found]
        yield np.array([row for row, *_ in found], dtype=np.int64), trees, weights
