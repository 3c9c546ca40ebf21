"""Which examples a step sees: a pure function of (seed, step), so that a resumed run needs no iterator state.

The stream of examples is endless. A mixture says which source each of its positions draws from and how many draws of that
source came before; `ftcli.data.pool` says which example a draw is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ftcli.data.pool import Extent, Pool
from ftcli.units import format_count

if TYPE_CHECKING:
    from ftcli.data.mixtures import Mixture


class Plan(Protocol):
    """What a mixture makes of a pool: the source of every position of the stream, wherever a run begins to ask."""

    @property
    def examples_per_epoch(self) -> int: ...

    @property
    def tokens_per_epoch(self) -> float:
        """What `train.max_tokens` counts of an epoch: all tokens, or those of new sources where replay comes on top."""
        ...

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
        roles: ``new`` or ``replay`` for each source; without them all are new.
        lengths: for each source ``(N,)`` tokens of its examples, for mixtures that count tokens exactly.
        first_trees: for each source ``(N + 1,)`` the first tree of each of its examples; None where an example is a tree.
        global_batch_size: examples per step; the last step of the last epoch may have fewer.
        epochs: passes over the examples, fractions allowed; 1 if neither `steps` nor `max_tokens` is given.
        steps: optimizer steps of the run.
        max_tokens: tokens of the run; it has as many examples as hold so many on average.
        seed: the run's seed.
        arrived: for sources that grow, as in `Pool`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        mean_tokens: Sequence[float],
        weights: Sequence[float],
        mixture: Mixture,
        *,
        roles: Sequence[str] | None = None,
        lengths: Sequence[NDArray[np.int32]] | None = None,
        first_trees: Sequence[NDArray[np.int64] | None] | None = None,
        global_batch_size: int,
        epochs: float | None = None,
        steps: int | None = None,
        max_tokens: int | None = None,
        seed: int,
        arrived: Callable[[int, int], int] | None = None,
    ) -> None:
        self.sizes = tuple(sizes)
        self.global_batch_size = global_batch_size
        self._first_trees = [None] * len(self.sizes) if first_trees is None else first_trees
        self.pool = Pool(
            sizes=self.sizes,
            mean_tokens=tuple(mean_tokens),
            weights=tuple(weights),
            roles=("new",) * len(self.sizes) if roles is None else tuple(roles),
            lengths=None if lengths is None else tuple(lengths),
            seed=seed,
            extent=Extent(global_batch_size, epochs, steps, max_tokens),
            window=mixture.window if mixture.kind == "stream" else None,
            arrived=arrived,
        )
        self._plan: Plan = mixture.plan(self.pool)
        self.examples_per_epoch = self._plan.examples_per_epoch
        self.num_examples = self.pool.extent.num_examples(self.examples_per_epoch, self._plan.tokens_per_epoch)
        self.num_steps = -(-self.num_examples // global_batch_size)

    def examples_at(self, step: int) -> list[tuple[int, int]]:
        """(source, tree) of each tree of the examples of `step`, which counts from 1 to `num_steps`."""
        if not 1 <= step <= self.num_steps:
            raise IndexError(f"step {step} is not in 1..{self.num_steps}")
        first = (step - 1) * self.global_batch_size
        positions = np.arange(first, min(first + self.global_batch_size, self.num_examples), dtype=np.uint64)
        sources, draws = self._plan.draws(positions)
        trees = np.empty(len(positions), dtype=np.int64)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            trees[chosen] = self.pool.trees(source, draws[chosen])
        pairs = list(zip(sources.tolist(), trees.tolist(), strict=True))
        return [(source, tree) for source, example in pairs for tree in self._trees_of(source, example)]

    def _trees_of(self, source: int, example: int) -> range:
        """The trees of an example: several for a block."""
        first_trees = self._first_trees[source]
        return range(example, example + 1) if first_trees is None else range(int(first_trees[example]), int(first_trees[example + 1]))

    def epoch_at(self, step: int) -> float:
        """Epochs that are done after `step`; the last step of a run over two epochs gives 2.0."""
        return min(step * self.global_batch_size, self.num_examples) / self.examples_per_epoch

    def planned_shares(self) -> list[float]:
        """Share of the tokens of the whole run that each source is to have; they add up to 1."""
        tokens = self._plan.shares * np.asarray(self.pool.mean_tokens)
        shares: list[float] = (tokens / tokens.sum()).tolist()
        return shares

    def plan_line(self, names: Sequence[str]) -> str:
        """What the run will have seen of each source, in one line."""
        tokens = self.num_examples * float(self._plan.shares @ np.asarray(self.pool.mean_tokens))
        parts = [
            f"{share:.0%} `{name}` ({passes:.2g} passes)"
            for name, share, passes in zip(names, self.planned_shares(), self.repeats(), strict=True)
        ]
        return f"of about {format_count(round(tokens))} tokens in {self.num_steps} steps: {', '.join(parts)}"

    def repeats(self) -> list[float]:
        """Passes over each source in the whole run; above 1 its examples repeat."""
        return [self.num_examples * share / self.pool.size(source) for source, share in enumerate(self._plan.shares.tolist())]
