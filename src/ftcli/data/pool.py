"""What a mixture is told: the sources that it mixes, the order in which each of them gives its examples, and how far the run goes.

Draws of a source are numbered; the d-th draw of a source of N examples is place d mod N of the order that belongs to pass d // N.
So a source is always seen whole before any of it is seen again, whatever the mixture. That order is of the whole source, or, where the
mixture reads from front to back, of one window after the other: then the source may still grow behind the windows that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftcli.data.permutation import permute


@dataclass(frozen=True, slots=True)
class Extent:
    """How far a run goes, in one of three units; one epoch where none is given."""

    global_batch_size: int
    """Examples per step; the last step may have fewer, unless `steps` is given."""
    epochs: float | None = None
    steps: int | None = None
    max_tokens: int | None = None

    def num_examples(self, examples_per_epoch: int, tokens_per_epoch: float) -> int:
        """Positions of the stream that the run has, at least 1.

        Example:
            >>> Extent(4, epochs=0.5).num_examples(30, 600.0), Extent(4, steps=3).num_examples(30, 600.0)
            (15, 12)
            >>> Extent(4, max_tokens=200).num_examples(30, 600.0), Extent(4).num_examples(30, 600.0)
            (10, 30)
        """
        if self.steps is not None:
            return self.steps * self.global_batch_size
        epochs = 1.0 if self.epochs is None else self.epochs
        if self.max_tokens is not None:
            epochs = self.max_tokens / max(1.0, tokens_per_epoch)
        # 0.1 * 30 is a little above 3: rounding must not add an example.
        return max(1, math.ceil(epochs * examples_per_epoch - 1e-6))


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The sources of a run."""

    sizes: tuple[int, ...]
    """Examples of each source, at least 1 each."""
    mean_tokens: tuple[float, ...]
    """Tokens per example of each source."""
    weights: tuple[float, ...]
    """Of each source, in the mixture's own unit."""
    roles: tuple[str, ...]
    """``new`` or ``replay`` for each source."""
    lengths: tuple[NDArray[np.int32], ...] | None
    """For each source ``(N,)`` tokens of its examples; without them every example has the mean."""
    seed: int
    extent: Extent
    window: int | None = None
    """Examples in a row that are shuffled among themselves; None shuffles a whole source."""
    arrived: Callable[[int, int], int] | None = None
    """Waits until a source has so many examples, and says how many it has: fewer if it has no more; None where all are there."""

    def trees(self, source: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tree of each draw of a source, both ``(n,)``."""
        if self.window is not None:
            return self._in_windows(source, draws, self.window)
        size = self.sizes[source]
        trees = np.empty(len(draws), dtype=np.int64)
        passes = draws // size
        for number in np.unique(passes).tolist():
            chosen = passes == number
            trees[chosen] = permute((draws[chosen] % size).astype(np.uint64), size, (self.seed, "pass", source, number))
        return trees

    def _in_windows(self, source: int, draws: NDArray[np.int64], window: int) -> NDArray[np.int64]:
        # With the whole of the last window there, what is drawn does not depend on whether more will come.
        end = (int(draws.max(initial=0)) // window + 1) * window
        size = self.sizes[source] if self.arrived is None else self.arrived(source, end)
        passes, places = np.divmod(draws, size)
        numbers = places // window
        trees = np.empty(len(draws), dtype=np.int64)
        for number, of in sorted(set(zip(passes.tolist(), numbers.tolist(), strict=True))):
            chosen, first = (passes == number) & (numbers == of), of * window
            inside = (places[chosen] - first).astype(np.uint64)
            trees[chosen] = first + permute(inside, min(window, size - first), (self.seed, "window", source, number, of))
        return trees

    def size(self, source: int) -> int:
        """Examples of a source, as many as there are by now."""
        return self.sizes[source] if self.window is None or self.arrived is None else self.arrived(source, 0)

    def tokens(self, source: int, draws: NDArray[np.int64]) -> NDArray[np.float64]:
        """Tokens of each draw of a source, both ``(n,)``."""
        if self.lengths is None:
            return np.full(len(draws), max(1.0, self.mean_tokens[source]))
        return self.lengths[source][self.trees(source, draws)].astype(np.float64)
