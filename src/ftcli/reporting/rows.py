"""Rows as the model sees them: which of their text is learnt, which is context only."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ftcli.data.tree import TokenTree
    from ftcli.models.tokenizer import Tokenizer

STYLES = {"target": "green", "context": "dim"}


def masked_text(tree: TokenTree, weights: NDArray[np.float32], tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """(text, weight) of each run of tokens of equal weight, segment by segment; weight 0 is context only."""
    runs = []
    for start, end in tree.segment_bounds():
        for weight, group in groupby(range(start, end), key=lambda index: float(weights[index])):
            runs.append((tokenizer.decode([int(tree.tokens[index]) for index in group]), weight))
    return runs


def plain_row(runs: Sequence[tuple[str, float]]) -> str:
    """The row without colours: what is learnt stands between ⟦ and ⟧.

    Example:
        >>> plain_row([("2+2=", 0.0), ("4", 1.0)])
        '2+2=⟦4⟧'
    """
    return "".join(f"⟦{text}⟧" if weight > 0 else text for text, weight in runs)
