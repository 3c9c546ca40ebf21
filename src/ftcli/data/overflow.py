"""Examples are fitted to the maximum length: refused, dropped, cut or split, as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ftcli.data.tokenise import EncodedExample
from ftcli.data.tree import SPAN, TokenTree, path_tree

Policy = Literal["error", "drop", "truncate_prompt", "split", "block"]
"""`on_overflow` of the recipe with `auto` decided; `block` cuts where blocks end, see `ftcli.data.blocks`."""


def fit(example: EncodedExample, max_length: int, policy: Policy) -> list[TokenTree]:
    """The trees to keep of an example; none if it is too long and cannot be, or may not be, made to fit."""
    if example.longest_branch <= max_length:
        return [example.tree()]
    if policy == "truncate_prompt":
        tree = _truncate_prompt(example.tree(), example.longest_branch - max_length, has_bos=_begins_with_bos(example))
        return [] if tree is None else [tree]
    if policy == "split" and example.is_path and example.labels is None:
        return split(example.tree(), example.bytes_between(), max_length)
    return []


def _begins_with_bos(example: EncodedExample) -> bool:
    ids = example.segments[0].encoded.ids
    tokenizer = example.tokeniser.tokenizer
    first = tokenizer.special.get("cls_token")
    return bool(ids) and ids[0] in (tokenizer.bos_id, None if first is None else tokenizer.backend.token_to_id(first))


def _truncate_prompt(tree: TokenTree, excess: int, *, has_bos: bool) -> TokenTree | None:
    """`tree` without the first `excess` tokens of what stands before its first answer; None if that is too short.

    A begin-of-text token stays, and at least one token is left to predict the answer's first from.
    """
    root_end = tree.segment_bounds()[0][1]
    trained = [start for start, _, weight, is_prompt in tree.spans.tolist() if weight > 0 and not is_prompt]
    first, last = int(has_bos), min([root_end, *trained])
    if excess > last - first or last - excess < 1:
        return None
    return _without(tree, first, first + excess)


def _without(tree: TokenTree, start: int, end: int) -> TokenTree:
    """`tree` without the tokens from `start` to `end` of its root, none of which is trained."""

    def moved(places: NDArray[np.int32]) -> NDArray[np.int32]:
        return (places - np.clip(places - start, 0, end - start)).astype(np.int32)

    spans = tree.spans.copy()
    spans["start"], spans["end"] = moved(spans["start"]), moved(spans["end"])
    return TokenTree(
        tokens=np.delete(tree.tokens, np.s_[start:end]),
        starts=moved(tree.starts),
        parents=tree.parents,
        spans=spans[spans["end"] > spans["start"]],
        num_bytes=tree.num_bytes,
        row=tree.row,
        labels=tree.labels,
    )


def split(tree: TokenTree, bytes_between: Callable[[int, int], int], max_length: int) -> list[TokenTree]:
    """Consecutive blocks of a path; those without a target are left out.

    A block begins with the last token of the block before it, as context, so that each target of the whole is a target of
    exactly one block and the blocks' bytes add up to the whole's.

    Args:
        tree: of one path.
        bytes_between: bytes of trained text that tokens of it, from one to before another, stand for.
        max_length: tokens of a block, at least 2.
    """
    firsts = range(0, len(tree) - 1, max_length - 1)
    return cut(tree, bytes_between, [(first, min(first + max_length, len(tree))) for first in firsts])


def cut(tree: TokenTree, bytes_between: Callable[[int, int], int], bounds: Iterable[tuple[int, int]]) -> list[TokenTree]:
    """Pieces of a path; those without a target are left out.

    Args:
        tree: of one path.
        bytes_between: bytes of trained text that tokens of it, from one to before another, stand for.
        bounds: first token of each piece and the one after its last; a piece that does not begin the path has its first token as
            context.
    """
    blocks, whole = [], tree.spans.tolist()
    for first, end in bounds:
        targets_from = first + 1 if first else 0
        inside = [(max(start, targets_from) - first, min(stop, end) - first, *others) for start, stop, *others in whole]
        spans = [span for span in inside if span[1] > span[0]]
        if any(not is_prompt and stop > max(start, 1) for start, stop, _, is_prompt in spans):
            piece = tree.tokens[first:end].copy()
            blocks.append(path_tree(piece, np.array(spans, dtype=SPAN), bytes_between(targets_from, end), tree.row))
    return blocks
