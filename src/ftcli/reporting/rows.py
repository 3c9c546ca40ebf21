"""Rows as the model sees them: which of their text is learnt, which is context only."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ftcli.data.store import TreeStore
    from ftcli.data.tree import TokenTree
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.objectives import Objective

SAMPLES_PER_SOURCE, SAMPLE_CHARS = 2, 1200
TURN_MARKERS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|###\ ?(?:Instruction|Response)|<\|(?:user|assistant)\|>"
)
"""With which the chat templates of common models begin a turn."""
STYLES = {"target": "green", "context": "dim"}


def masked_text(tree: TokenTree, weights: NDArray[np.float32], tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """(text, weight) of each run of tokens of equal weight, segment by segment; weight 0 is context only."""
    runs = []
    for start, end in tree.segment_bounds():
        for weight, group in groupby(range(start, end), key=lambda index: float(weights[index])):
            runs.append((tokenizer.decode([int(tree.tokens[index]) for index in group]), weight))
    return runs


def mask_samples(objective: Objective, stores: Sequence[TreeStore], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The first rows of each training source as pieces of (text, weight), as far as they are worth reading."""
    found = []
    for store in stores:
        for index in range(min(SAMPLES_PER_SOURCE, len(store))):
            posed = objective.pose(store.tree(index))
            whole = masked_text(posed.tree, posed.target_weights, tokenizer)
            marks = foreign_markers("".join(text for text, _ in whole), tokenizer.added_texts) if store.report.format != "text" else []
            pieces = [[text, round(weight, 4)] for text, weight in _cut(whole, SAMPLE_CHARS)]
            found.append({"source": store.name, "where": store.where(index), "pieces": pieces, "foreign_markers": marks})
    return found


def foreign_markers(text: str, known: Collection[str]) -> list[str]:
    """Turn markers in a rendered row that its template has not written: those of other models, and those that stand twice in a row.

    Args:
        known: texts that are one token each.

    Example:
        >>> foreign_markers("<|im_start|>user\\n[INST] Hi [/INST]<|im_end|>", {"<|im_start|>", "<|im_end|>"})
        ['[INST]']
        >>> foreign_markers("<|im_start|>user\\n<|im_start|>user\\nHi<|im_end|>", {"<|im_start|>", "<|im_end|>"})
        ['<|im_start|>']
    """
    marks = dict.fromkeys(TURN_MARKERS.findall(text))
    return [mark for mark in marks if mark not in known or re.search(rf"{re.escape(mark)}\s*\w*\s*{re.escape(mark)}", text)]


def _cut(pieces: Sequence[tuple[str, float]], most: int) -> list[tuple[str, float]]:
    """The pieces as far as they have `most` characters together."""
    kept, room = [], most
    for text, weight in pieces:
        if room <= 0:
            break
        kept.append((text if len(text) <= room else f"{text[:room]}…", weight))
        room -= len(text)
    return kept


def plain_row(runs: Sequence[tuple[str, float]]) -> str:
    """The row without colours: what is learnt stands between ⟦ and ⟧.

    Example:
        >>> plain_row([("2+2=", 0.0), ("4", 1.0)])
        '2+2=⟦4⟧'
    """
    return "".join(f"⟦{text}⟧" if weight > 0 else text for text, weight in runs)
