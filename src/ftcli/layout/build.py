"""From token trees to a batch, in either layout. Same trees, same targets, same losses.

The forest lays all segments one after the other, without padding and with shared prefixes once. Rows are the same trees
unrolled, one padded row a branch; a shared segment's targets are counted in its first branch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ftcli.data.tree import TokenTree
from ftcli.layout.batch import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from ftcli.objectives.objective import Posed

Weights = NDArray[np.float32]
Integers = NDArray[np.int64]


def build_batch(layout: str, trees: Sequence[TokenTree], weights: Sequence[Weights], pad_id: int = 0) -> Batch:
    """Lay out `trees` as one batch on the CPU.

    Args:
        layout: ``forest`` or ``rows``.
        weights: for each tree ``(n,)`` float32, the weight of each token as a target.
        pad_id: any token id; it fills slots that are masked out by position.
    """
    return _forest_batch(trees, weights) if layout == "forest" else _rows_batch(trees, weights, pad_id)


def build_posed(layout: str, posed: Sequence[Posed], pad_id: int = 0) -> Batch:
    """Lay out examples as an objective puts them, with the labels and features that they have."""
    import torch

    batch = build_batch(layout, [item.tree for item in posed], [item.target_weights for item in posed], pad_id)
    labels, features = [item.labels for item in posed], [item.tree.features for item in posed]
    if labels[0] is not None:
        weights = torch.tensor([item.weight for item in posed], dtype=torch.float32)
        batch = replace(batch, labels=_tensor(np.stack(cast("list[Weights]", labels))), label_weights=weights)
    if all(vector is not None for vector in features):
        batch = replace(batch, features=_tensor(np.stack(cast("list[Weights]", features))))
    return batch


def ancestor_paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """For each segment the indices of the segments it hangs on, root first."""
    paths: list[tuple[int, ...]] = []
    for parent in tree.parents.tolist():
        paths.append(() if parent < 0 else (*paths[parent], parent))
    return paths


def leaf_segments(tree: TokenTree) -> list[int]:
    """Indices of the segments that nothing hangs on: each ends a branch."""
    inner = set(tree.parents.tolist())
    return [index for index in range(len(tree.starts)) if index not in inner]


def longest_branch(tree: TokenTree) -> int:
    """Tokens along the longest branch."""
    lengths = [end - start for start, end in tree.segment_bounds()]
    return max(sum(lengths[s] for s in (*path, index)) for index, path in enumerate(ancestor_paths(tree)))


class _Targets:
    """The per-target columns of a batch, gathered tree by tree."""

    def __init__(self) -> None:
        self.predict_from: list[Integers] = []
        self.tokens: list[NDArray[np.int32]] = []
        self.weights: list[Weights] = []
        self.branches: list[Integers] = []
        self.examples: list[Integers] = []

    def add(self, slots: Integers, tokens: NDArray[np.int32], weights: Weights, branch: int, example: int) -> None:
        """Add the targets among consecutive tokens of one segment; ``slots[i]`` predicts ``tokens[i]``."""
        chosen = np.flatnonzero(weights)
        if len(chosen):
            self.predict_from.append(slots[chosen])
            self.tokens.append(tokens[chosen])
            self.weights.append(weights[chosen])
            self.branches.append(np.full(len(chosen), branch, dtype=np.int64))
            self.examples.append(np.full(len(chosen), example, dtype=np.int64))

    def columns(self) -> dict[str, Any]:
        integer, real = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        return {
            "predict_from": _tensor(np.concatenate([integer, *self.predict_from])),
            "targets": _tensor(np.concatenate([integer, *self.tokens]).astype(np.int64)),
            "weights": _tensor(np.concatenate([real, *self.weights])),
            "branch": _tensor(np.concatenate([integer, *self.branches])),
            "example": _tensor(np.concatenate([integer, *self.examples])),
        }


def _tensor(array: NDArray[np.generic]) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def _forest_batch(trees: Sequence[TokenTree], weights: Sequence[Weights]) -> Batch:
    import torch

    from ftcli.layout.attention import Forest

    targets, positions, readout = _Targets(), [], []
    lengths: list[int] = []
    ancestors: list[tuple[int, ...]] = []
    offset = num_branches = 0
    for example, (tree, weight) in enumerate(zip(trees, weights, strict=True)):
        first_segment, bounds, paths = len(lengths), tree.segment_bounds(), ancestor_paths(tree)
        first_branch = _first_branches(tree, paths)
        for index, (start, end) in enumerate(bounds):
            above = sum(bounds[a][1] - bounds[a][0] for a in paths[index])
            lengths.append(end - start)
            ancestors.append(tuple(first_segment + a for a in paths[index]))
            positions.append(np.arange(above, above + end - start))
            # A branch's first token is predicted from the last token of its parent, all others from the one before.
            slots = np.arange(offset + start - 1, offset + end - 1)
            if paths[index]:
                slots[0] = offset + bounds[paths[index][-1]][1] - 1
            targets.add(slots, tree.tokens[start:end], weight[start:end], num_branches + first_branch[index], example)
        leaves = leaf_segments(tree)
        readout += [offset + bounds[leaf][1] - 1 for leaf in leaves]
        num_branches += len(leaves)
        offset += len(tree)
    return Batch(
        input_ids=_tensor(np.concatenate([tree.tokens for tree in trees]).astype(np.int64)).unsqueeze(0),
        position_ids=_tensor(np.concatenate(positions)).unsqueeze(0),
        attention_mask=None,
        forest=Forest(tuple(lengths), tuple(ancestors), torch.device("cpu")),
        readout=torch.tensor(readout, dtype=torch.int64),
        num_tokens=offset,
        **targets.columns(),
    )


def _rows_batch(trees: Sequence[TokenTree], weights: Sequence[Weights], pad_id: int) -> Batch:
    import torch

    branches = [(e, leaf) for e, tree in enumerate(trees) for leaf in leaf_segments(tree)]
    width = max(longest_branch(tree) for tree in trees)
    input_ids = np.full((len(branches), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(branches), width), dtype=np.int64)
    targets, readout, counted = _Targets(), [], set()
    for row, (example, leaf) in enumerate(branches):
        tree, bounds, filled = trees[example], trees[example].segment_bounds(), 0
        for segment in (*ancestor_paths(tree)[leaf], leaf):
            start, end = bounds[segment]
            input_ids[row, filled : filled + end - start] = tree.tokens[start:end]
            slots = row * width + np.arange(filled - 1, filled - 1 + end - start)
            if (example, segment) not in counted:
                targets.add(slots, tree.tokens[start:end], weights[example][start:end], row, example)
                counted.add((example, segment))
            filled += end - start
        mask[row, :filled] = 1
        readout.append(row * width + filled - 1)
    return Batch(
        input_ids=_tensor(input_ids),
        position_ids=_tensor(np.tile(np.arange(width), (len(branches), 1))),
        attention_mask=_tensor(mask),
        forest=None,
        readout=torch.tensor(readout, dtype=torch.int64),
        num_tokens=sum(len(tree) for tree in trees),
        **targets.columns(),
    )


def _first_branches(tree: TokenTree, paths: list[tuple[int, ...]]) -> dict[int, int]:
    """For each segment the index, within the tree, of the first branch that runs through it."""
    first: dict[int, int] = {}
    for branch, leaf in enumerate(leaf_segments(tree)):
        for segment in (*paths[leaf], leaf):
            first.setdefault(segment, branch)
    return first
