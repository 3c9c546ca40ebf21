"""An example as tokens: a tree of segments, each with a parent.

A text or a chat is a tree of one segment; a preference pair is a prompt with two branches.
Legend: ``n`` tokens in the tree, ``S`` segments, ``P`` spans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# `start`, `end` count tokens of the tree, end excluded. `weight` is the weight of each of these tokens as a target.
# `is_prompt` marks spans whose weight the objective scales with its `prompt_loss_weight`.
SPAN = np.dtype([("start", "<i4"), ("end", "<i4"), ("weight", "<f4"), ("is_prompt", "?")])


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """One example's tokens, segment after segment, parents before children.

    A token predicts the next token of its branch, so the first token of the root is never a target. Tokens outside every
    span have weight 0: they are context only.
    """

    tokens: NDArray[np.int32]
    """(n,) token ids."""
    starts: NDArray[np.int32]
    """(S,) first token of each segment; ``starts[0] == 0``."""
    parents: NDArray[np.int32]
    """(S,) index of the parent segment, -1 for the root."""
    spans: NDArray[np.void]
    """(P,) of dtype `SPAN`, sorted by start, not overlapping."""
    num_bytes: int
    """UTF-8 bytes of the text of the tokens whose span is no prompt and has a weight above 0 (for bits per byte)."""
    row: int
    """Index of the row in its source, counted from 0."""
    labels: tuple[str, ...] | None = None
    """What the row is said to be: names of classes, or one number as text; None where the row says nothing of the kind."""
    features: NDArray[np.float32] | None = None
    """(D,) what a frozen base makes of the tree, where that was computed before."""

    def __len__(self) -> int:
        return len(self.tokens)

    def segment_bounds(self) -> list[tuple[int, int]]:
        """(start, end) of each segment, in tokens of the tree."""
        return list(zip(self.starts.tolist(), [*self.starts[1:].tolist(), len(self.tokens)], strict=True))


def path_tree(tokens: NDArray[np.int32], spans: NDArray[np.void], num_bytes: int, row: int) -> TokenTree:
    """A tree of one path: a text, a chat, a prompt with its completion."""
    root = np.zeros(1, dtype=np.int32)
    return TokenTree(tokens=tokens, starts=root, parents=root - 1, spans=spans, num_bytes=num_bytes, row=row)


def target_weights(tree: TokenTree, prompt_loss_weight: float) -> NDArray[np.float32]:
    """(n,) weight of each token as a target; 0 for tokens that are context only."""
    weights = np.zeros(len(tree), dtype=np.float32)
    for start, end, weight, is_prompt in tree.spans.tolist():
        weights[start:end] = weight * (prompt_loss_weight if is_prompt else 1.0)
    weights[0] = 0.0
    return weights
