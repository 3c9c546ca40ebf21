"""A mixture that counts passes: weight 1 sees every example of a source once per epoch, 0.1 a tenth of them, 3 each three times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ftcli.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.data.order import Plan
    from ftcli.data.pool import Pool


class Passes(Spec):
    """The weight of a source is the number of passes over it in one epoch; a fraction takes other examples in the next epoch."""

    kind: Literal["passes"] = "passes"

    def plan(self, pool: Pool) -> Plan:
        """Which source each position of the endless stream of examples draws from."""
        import numpy as np

        draws = np.maximum(1, np.rint(np.asarray(pool.sizes) * np.asarray(pool.weights, dtype=np.float64))).astype(np.int64)
        return PassesPlan(draws_per_epoch=draws, seed=pool.seed, tokens_per_epoch=float(draws @ np.asarray(pool.mean_tokens)))


@dataclass(frozen=True, slots=True, eq=False)
class PassesPlan:
    """Each epoch holds a fixed number of draws from each source, shuffled over the whole epoch."""

    draws_per_epoch: NDArray[np.int64]
    """(number of sources,) at least 1 each."""
    seed: int
    tokens_per_epoch: float

    @property
    def examples_per_epoch(self) -> int:
        return int(self.draws_per_epoch.sum())

    @property
    def shares(self) -> NDArray[np.float64]:
        shares: NDArray[np.float64] = self.draws_per_epoch / self.draws_per_epoch.sum()
        return shares

    def draws(self, positions: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position, and how many draws of that source are numbered before it.

        Args:
            positions: ``(n,)`` uint64, places in the stream of examples, counted from 0 over all epochs.
        """
        import numpy as np

        from ftcli.data.permutation import permute

        epochs = (positions // np.uint64(self.examples_per_epoch)).astype(np.int64)
        slots = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            slots[chosen] = permute(
                positions[chosen] % np.uint64(self.examples_per_epoch), self.examples_per_epoch, (self.seed, "epoch", epoch)
            )
        ends = np.cumsum(self.draws_per_epoch)
        sources = np.searchsorted(ends, slots, side="right")
        first_slots = ends - self.draws_per_epoch
        return sources, epochs * self.draws_per_epoch[sources] + slots - first_slots[sources]
