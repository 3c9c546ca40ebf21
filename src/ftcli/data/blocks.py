"""Blocks: documents one behind the other, cut every so many tokens, so that every example of a text source is equally long.

A document that reaches over the end of a block goes on in the next one, behind the last token it had, as context: each target of a
document is a target of exactly one block. The documents of a block stay trees of their own: none of them sees another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ftcli.data.overflow import cut
from ftcli.data.tree import TokenTree

if TYPE_CHECKING:
    from ftcli.data.tokenise import EncodedExample

# A block's first tree, and its tokens.
BLOCK = np.dtype([("tree", "<i8"), ("tokens", "<i4")])
MIN_PIECE = 2  # tokens: one to predict from, one to predict


class BlockCutter:
    """Cuts documents, one after the other, where blocks end.

    Args:
        max_length: tokens of a block.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._room = max_length
        self._first_trees = [0]
        self._num_tokens = [0]
        self._num_trees = 0

    def trees(self, example: EncodedExample) -> list[TokenTree]:
        """The document's pieces in the blocks that they go to; those without a target are left out."""
        tree = example.tree()
        bounds = list(self._bounds(len(tree)))
        if len(bounds) == 1:
            self._add(len(tree), bounds[0][0])
            return [tree]
        pieces, bytes_between = [], example.bytes_between()
        for starts_block, first, end in bounds:
            found = cut(tree, bytes_between, [(first, end)])
            pieces += found
            self._add(end - first if found else 0, starts_block, len(found))
        return pieces

    def blocks(self) -> NDArray[np.void]:
        """(B,) of dtype `BLOCK`: the blocks so far that have a tree."""
        pairs = [(tree, tokens) for tree, tokens in zip(self._first_trees, self._num_tokens, strict=True) if tokens]
        return np.array(pairs, dtype=BLOCK)

    def _bounds(self, length: int) -> Iterator[tuple[bool, int, int]]:
        """(whether a block begins with it, first token, the one after the last) of each piece of a document."""
        first, room = 0, self._room
        while True:
            starts_block = room < min(MIN_PIECE, length)
            if starts_block:
                room = self._max_length
            end = min(first + room, length)
            room -= end - first
            yield starts_block, first, end
            if end == length:
                break
            first = end - 1
        self._room = room

    def _add(self, num_tokens: int, starts_block: bool, num_trees: int = 1) -> None:
        if starts_block:
            self._first_trees.append(self._num_trees)
            self._num_tokens.append(0)
        self._num_trees += num_trees
        self._num_tokens[-1] += num_tokens
