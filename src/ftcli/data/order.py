"""Which examples a step sees: a pure function of (seed, step), so that a resumed run needs no iterator state.

The stream of examples is endless. A mixture says which source each of its positions draws from and how many draws of that
source came before; the d-th draw of a source of N examples is place d mod N of the order that belongs to pass d // N. So a
source is always seen whole before any of it is seen again, whatever the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ftcli.data.permutation import permute

if TYPE_CHECKING:
    from ftcli.data.mixtures import Mixture


class Plan(Protocol):
    """What a mixture makes of the sources' sizes: the source of every position of the stream, in constant time."""

    @property
    def examples_per_epoch(self) -> int: ...

    @property
    def shares(self) -> NDArray[np.float64]:
        """(number of sources,) share of the positions that draw from each source."""
        ...

    def draws(self, positions: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position and the number of its draw, both ``(n,)``; a source's draws are numbered without gaps."""
        ...


class Order:
    """The examples of every step of a run.

    Args:
        sizes: examples of each source, at least 1 each.
        mean_tokens: mean tokens per example of each source, for mixtures that count tokens.
        weights: of each source, in the mixture's own unit.
        mixture: how the sources are mixed.
        global_batch_size: examples per step; the last step of the last epoch may have fewer.
        epochs: passes over the examples, fractions allowed; unused if `steps` is given, 1 if neither is.
        steps: optimizer steps of the run.
        seed: the run's seed.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        mean_tokens: Sequence[float],
        weights: Sequence[float],
        mixture: Mixture,
        *,
        global_batch_size: int,
        epochs: float | None = None,
        steps: int | None = None,
        seed: int,
    ) -> None:
        self.sizes = tuple(sizes)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._plan: Plan = mixture.plan(sizes, mean_tokens, weights, seed)
        self.examples_per_epoch = self._plan.examples_per_epoch
        if steps is None:
            # 0.1 * 30 is a little above 3: rounding must not add an example.
            self.num_examples = max(1, math.ceil((1.0 if epochs is None else epochs) * self.examples_per_epoch - 1e-6))
        else:
            self.num_examples = steps * global_batch_size
        self.num_steps = -(-self.num_examples // global_batch_size)

    def examples_at(self, step: int) -> list[tuple[int, int]]:
        """(source, tree) of each example of `step`, which counts from 1 to `num_steps`."""
        if not 1 <= step <= self.num_steps:
            raise IndexError(f"step {step} is not in 1..{self.num_steps}")
        first = (step - 1) * self.global_batch_size
        positions = np.arange(first, min(first + self.global_batch_size, self.num_examples), dtype=np.uint64)
        sources, draws = self._plan.draws(positions)
        trees = np.empty(len(positions), dtype=np.int64)
        for source, number in sorted({(s, d // self.sizes[s]) for s, d in zip(sources.tolist(), draws.tolist(), strict=True)}):
            size = self.sizes[source]
            chosen = (sources == source) & (draws // size == number)
            trees[chosen] = permute((draws[chosen] % size).astype(np.uint64), size, (self.seed, "pass", source, number))
        return list(zip(sources.tolist(), trees.tolist(), strict=True))

    def epoch_at(self, step: int) -> float:
        """Epochs that are done after `step`; the last step of a run over two epochs gives 2.0."""
        return min(step * self.global_batch_size, self.num_examples) / self.examples_per_epoch

    def repeats(self) -> list[float]:
        """Passes over each source in the whole run; above 1 its examples repeat."""
        return [self.num_examples * share / size for share, size in zip(self._plan.shares.tolist(), self.sizes, strict=True)]
