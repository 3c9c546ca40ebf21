"""A mixture that keeps shares: of any stretch of the stream, each source makes up its share, in rows or in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ftcli.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.data.pool import Pool

BLOCK = 1 << 16  # positions after which the pattern of sources repeats: the finest share is 1 in so many


class Shares(Spec):
    """The weight of a source, over the sum of all weights, is its share of what is seen; small sources repeat, large ones are not finished.

    An epoch is one pass over the source that is listed first.
    """

    kind: Literal["shares"] = "shares"
    unit: Literal["rows", "tokens"] = "rows"
    """What is shared out: `rows` counts examples, `tokens` counts their mean length, too."""

    def plan(self, pool: Pool) -> SharesPlan:
        """Which source each position of the endless stream of examples draws from."""
        import numpy as np

        from ftcli.data.permutation import key_of

        rates = np.asarray(pool.weights, dtype=np.float64)
        if self.unit == "tokens":
            rates = rates / np.maximum(1.0, np.asarray(pool.mean_tokens, dtype=np.float64))
        shares = rates / rates.sum()
        counts = _apportion(shares, BLOCK)
        # Even spacing with a phase of its own for each source: every window holds each share to within a draw or two.
        places = [(np.arange(count) + key_of(pool.seed, "phase", source) / 2.0**64) / count for source, count in enumerate(counts.tolist())]
        sources = np.repeat(np.arange(len(counts)), counts)[np.argsort(np.concatenate(places), kind="stable")]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for source in range(len(counts)):
            ranks[sources == source] = np.arange(counts[source])
        return SharesPlan(
            examples_per_epoch=max(1, round(pool.sizes[0] / float(shares[0]))),
            mean_tokens=float(counts @ np.asarray(pool.mean_tokens)) / BLOCK,
            shares=counts / BLOCK,
            counts=counts,
            sources=sources,
            ranks=ranks,
        )


def _apportion(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """`total` seats by largest remainder, at least one each.

    Source: Hamilton's method of apportionment.
    """
    import numpy as np

    counts = np.maximum(1, np.floor(shares * total)).astype(np.int64)
    remainders = shares * total - counts
    while (missing := total - int(counts.sum())) != 0:
        source = int(np.argmax(remainders)) if missing > 0 else int(np.argmax(np.where(counts > 1, -remainders, -np.inf)))
        counts[source] += 1 if missing > 0 else -1
        remainders[source] -= 1 if missing > 0 else -1
    return counts


@dataclass(frozen=True, slots=True, eq=False)
class SharesPlan:
    """One block of positions, repeated for ever."""

    examples_per_epoch: int
    mean_tokens: float
    """Tokens per position."""
    shares: NDArray[np.float64]
    """(number of sources,) share of the positions, as realised."""
    counts: NDArray[np.int64]
    """(number of sources,) draws per block."""
    sources: NDArray[np.int64]
    """(BLOCK,) the source of each position of a block."""
    ranks: NDArray[np.int64]
    """(BLOCK,) how many positions of the block before it have the same source."""

    @property
    def tokens_per_epoch(self) -> float:
        return self.examples_per_epoch * self.mean_tokens

    def draws(self, positions: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position, and how many draws of that source come before it.

        Args:
            positions: ``(n,)`` uint64, places in the stream of examples, counted from 0 over all epochs.
        """
        import numpy as np

        blocks, places = np.divmod(positions.astype(np.int64), BLOCK)
        sources = self.sources[places]
        return sources, blocks * self.counts[sources] + self.ranks[places]
