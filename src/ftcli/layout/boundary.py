"""The boundary between the lower decoder layers and the upper ones: each part of the forward pass on its own.

A switch stands in front of every layer's forward pass. In a lower pass the upper layers hand through what they get; in an upper
pass the lower ones do, and the topmost of them gives what is known to stand at the boundary. The decoder around them does what it
always does: embeddings, positions, masks, the final norm.
Legend: ``T`` token slots, ``D`` hidden size, ``b`` lower layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ftcli.layout.attention import Forest
from ftcli.layout.batch import Batch


class Boundary:
    """Passes through the part of a stack of layers below or above `num_lower`."""

    def __init__(self, layers: nn.ModuleList, num_lower: int) -> None:
        self.num_lower = num_lower
        self._layers = layers
        self._mode = "whole"
        self._hidden: Tensor | None = None
        self._num_extras = 0
        """What a layer returns beside its hidden states."""
        for number, layer in enumerate(layers):
            layer.forward = partial(self._forward, number, layer.forward)

    def remove(self) -> None:
        """Give every layer its own forward pass back."""
        for layer in self._layers:
            del layer.forward

    @contextmanager
    def lower(self) -> Iterator[None]:
        """Only the lower layers compute; afterwards `hidden` is what the topmost of them gave."""
        with self._switched("lower", None), torch.no_grad():
            yield

    @contextmanager
    def upper(self, hidden: Tensor) -> Iterator[None]:
        """Only the upper layers compute, from `hidden` of the shape (B, L, D)."""
        with self._switched("upper", hidden):
            yield

    @property
    def hidden(self) -> Tensor:
        """(B, L, D) what the last lower pass, or whole one, had at the boundary."""
        assert self._hidden is not None, "no pass before"
        return self._hidden

    @contextmanager
    def _switched(self, mode: str, hidden: Tensor | None) -> Iterator[None]:
        self._mode, self._hidden = mode, hidden
        try:
            yield
        finally:
            self._mode = "whole"

    def _forward(self, number: int, own: Any, *arguments: Any, **named: Any) -> Any:
        is_lower = number < self.num_lower
        if self._mode == "whole" or is_lower == (self._mode == "lower"):
            output = own(*arguments, **named)
            if number == self.num_lower - 1:
                self._num_extras = len(output) - 1 if isinstance(output, tuple) else 0
                self._hidden = (output[0] if isinstance(output, tuple) else output).detach()
            return output
        passed = arguments[0] if arguments else named["hidden_states"]
        if self._mode == "upper" and number == self.num_lower - 1:
            passed = cast("Tensor", self._hidden)
        return (passed, *(None,) * self._num_extras) if self._num_extras else passed


def tree_slots(batch: Batch) -> list[slice]:
    """Where each tree of a batch stands in its T slots; in the rows layout only for batches of one row a tree."""
    if batch.forest is None:
        assert batch.attention_mask is not None
        width = batch.input_ids.shape[1]
        return [slice(row * width, row * width + length) for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist())]
    slots: list[slice] = []
    offset = 0
    for length, above in zip(batch.forest.lengths, batch.forest.ancestors, strict=True):
        slots = [*slots, slice(offset, offset)] if not above else slots
        offset += length
        slots[-1] = slice(slots[-1].start, offset)
    return slots


def only_trees(batch: Batch, chosen: Sequence[int]) -> Batch:
    """The inputs of some trees of a batch, without any targets: enough for a pass through the decoder."""
    columns = ("predict_from", "targets", "weights", "branch", "example", "readout")
    none: dict[str, Any] = {name: getattr(batch, name)[:0] for name in columns}
    none["origin"] = None
    if batch.forest is None:
        assert batch.attention_mask is not None
        rows = torch.tensor(chosen, device=batch.input_ids.device)
        width = int(batch.attention_mask[rows].sum(dim=1).max())
        inputs = {name: getattr(batch, name)[rows, :width] for name in ("input_ids", "position_ids", "attention_mask")}
        return replace(batch, **inputs, **none)
    slots = tree_slots(batch)
    index = torch.cat([torch.arange(slots[i].start, slots[i].stop) for i in chosen]).to(batch.input_ids.device)
    forest = _only_trees(batch.forest, chosen)
    return replace(batch, input_ids=batch.input_ids[:, index], position_ids=batch.position_ids[:, index], forest=forest, **none)


def _only_trees(forest: Forest, chosen: Sequence[int]) -> Forest:
    """The segments of some trees; a segment without ancestors begins a tree."""
    roots = [index for index, above in enumerate(forest.ancestors) if not above]
    ends = [*roots[1:], len(forest.lengths)]
    segments = [segment for tree in chosen for segment in range(roots[tree], ends[tree])]
    place = {segment: index for index, segment in enumerate(segments)}
    lengths = tuple(forest.lengths[segment] for segment in segments)
    return Forest(lengths, tuple(tuple(place[a] for a in forest.ancestors[segment]) for segment in segments), forest.device)
