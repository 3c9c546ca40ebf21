"""One tensor of every model, seen a piece at a time: what a merge method reads, so that no tensor has to be in memory whole.

A piece is a run of whole rows (the last dimension; a vector or a scalar is one row), the same of every model. A method looks at the
pieces as often as it needs for what it has to know of the whole tensor, and returns the function that merges one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ftcli.merging.numbers import Array
from ftcli.merging.randomness import Randomness

if TYPE_CHECKING:
    from ftcli.merging.selection import Largest

PIECE_ELEMENTS = 2**16

Settings = Mapping[str, Any]
"""The value of every parameter of a method; of a parameter that each model has its own of, a tuple in the order of the models."""


@dataclass(frozen=True)
class Piece:
    """Some rows of one tensor, from every model. The arrays are shared between the passes: read, never written."""

    index: int
    """Which piece it is, from 0."""
    start: int
    """Flat index of its first element."""
    models: tuple[Array, ...]
    """``(rows, columns)`` of each model."""
    base: Array | None
    """``(rows, columns)`` of the base model, where the method has one."""
    statistics: tuple[Array, ...] = ()
    """``(rows, columns)`` of each model's statistics, where the method reads them."""

    @cached_property
    def deltas(self) -> tuple[Array, ...]:
        """What each model changes of the base."""
        assert self.base is not None, "a method on deltas has a base"
        return tuple(model - self.base for model in self.models)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.models[0].shape
        return rows, columns


PieceFunction = Callable[[Piece], Array]
"""Merges one piece."""


class Inputs(Protocol):
    """One tensor of every model."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def num_models(self) -> int:
        """Without the base."""

    @property
    def randomness(self) -> Randomness:
        """Of this tensor."""

    @property
    def limits(self) -> tuple[Largest, ...]:
        """Of each model, which of its changes are kept, found over all tensors. Empty where the method did not ask."""

    def pieces(self) -> Iterator[Piece]:
        """From the first row to the last."""

    def sample(self) -> Piece | None:
        """Evenly spaced rows, about as many as a piece has; None of a tensor with few."""

    def whole_statistics(self) -> tuple[Array, ...]:
        """Each model's statistics in one array."""


@dataclass(frozen=True)
class ArrayInputs:
    """Tensors that are in memory already."""

    models: Sequence[NDArray[Any]]
    base: NDArray[Any] | None = None
    randomness: Randomness = field(default_factory=lambda: Randomness(0, "tensor", ()))
    statistics: Sequence[NDArray[Any]] = ()
    limits: tuple[Largest, ...] = ()
    piece_elements: int = PIECE_ELEMENTS

    @property
    def shape(self) -> tuple[int, int]:
        return rows_and_columns(self.models[0].shape)

    @property
    def num_models(self) -> int:
        return len(self.models)

    def pieces(self) -> Iterator[Piece]:
        rows, columns = self.shape
        models = [_as_rows(model) for model in self.models]
        base = None if self.base is None else _as_rows(self.base)
        elementwise = [_as_rows(statistic) for statistic in self.statistics if np.shape(statistic) == np.shape(self.models[0])]
        for index, (first, last) in enumerate(row_ranges(rows, columns, self.piece_elements)):
            part = slice(first, last)
            yield Piece(
                index,
                first * columns,
                tuple(model[part] for model in models),
                None if base is None else base[part],
                tuple(statistic[part] for statistic in elementwise),
            )

    def sample(self) -> Piece | None:
        chosen = sampled_rows(*self.shape)
        if chosen is None:
            return None
        base = None if self.base is None else _as_rows(self.base)[chosen]
        return Piece(0, 0, tuple(_as_rows(model)[chosen] for model in self.models), base)

    def whole_statistics(self) -> tuple[Array, ...]:
        return tuple(np.asarray(statistic, np.float32) for statistic in self.statistics)


def _as_rows(array: NDArray[Any]) -> Array:
    return np.asarray(array, np.float32).reshape(rows_and_columns(np.shape(array)))


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """A shape with all but its last dimension folded into rows.

    Example:
        >>> rows_and_columns((2, 3, 4)), rows_and_columns((5,)), rows_and_columns(())
        ((6, 4), (1, 5), (1, 1))
    """
    if not shape:
        return 1, 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, shape[-1]


def sampled_rows(rows: int, columns: int) -> range | None:
    """Evenly spaced rows of about one piece together; None where that is no small part of all, as of a vector.

    Example:
        >>> sampled_rows(4096, 1024), sampled_rows(64, 1024), sampled_rows(1, 2**22)
        (range(32, 4096, 64), None, None)
    """
    step = rows * columns // PIECE_ELEMENTS
    return range(step // 2, rows, step) if 3 < step <= rows else None


def row_ranges(rows: int, columns: int, elements: int = PIECE_ELEMENTS) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) row of each piece of about `elements` elements.

    Example:
        >>> list(row_ranges(5, 4, 8)), list(row_ranges(2, 100, 8))
        ([(0, 2), (2, 4), (4, 5)], [(0, 1), (1, 2)])
    """
    step = max(1, elements // max(1, columns))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)
