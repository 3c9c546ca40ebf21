"""The order of a mixture in which every source keeps its share of the tokens, in every stretch of the run.

Tokens are counted as they are, not by their mean. Each source has a clock: with a share q, and t tokens of all sources seen, it
ought to have given q * t of them; the next example is the one that is due first. So at any moment no source is ahead or behind by
more than about one example of each source, and over any window the realised share is the one asked for.

The run is cut into stretches of whole steps in which shares stand still. What a stretch begins with (the draws of each source and
what each is owed) follows from the stretches before it: it is computed once, in order, and nothing of it is kept for a resume.
Legend: ``S`` sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ftcli.data.pool import Pool

MAX_STRETCHES = 512  # a schedule moves by about so small a part of its way at a time
READ_AHEAD = 8192
NOTHING = 1e-300


@dataclass(frozen=True, slots=True, eq=False)
class _Start:
    """What a stretch begins with; ``(S,)`` for each source."""

    draws: NDArray[np.int64]
    """Draws before it."""
    owed: NDArray[np.float64]
    """Tokens by which the source is behind its share; they add up to 0."""


class TokenClock:
    """The stream of a whole run over new and replayed sources.

    Args:
        pool: the sources.
        share_at: share of new tokens at a point of the run, from 0 at its first step to 1 at its last.
        is_additive: an epoch is a pass over the new sources, with replay on top; otherwise it has as many tokens as they have.
    """

    def __init__(self, pool: Pool, share_at: Callable[[float], float], *, is_additive: bool) -> None:
        self._pool = pool
        self._share_at = share_at
        self._means = np.maximum(1.0, np.asarray(pool.mean_tokens, dtype=np.float64))
        is_new = np.array([role == "new" for role in pool.roles])
        weights = np.asarray(pool.weights, dtype=np.float64)
        # Shares of tokens inside each role. Of a role without sources nothing can be had: the other one is all there is.
        self._new = np.where(is_new, weights, 0.0) / max(float(weights[is_new].sum()), NOTHING)
        self._replay = np.where(is_new, 0.0, weights) / max(float(weights[~is_new].sum()), NOTHING)
        rows = [self._rows_at(progress) for progress in (np.arange(MAX_STRETCHES) + 0.5) / MAX_STRETCHES]
        self.shares: NDArray[np.float64] = np.mean(rows, axis=0)
        tokens_per_row = float(self.shares @ self._means)
        new_per_row = float((self.shares * is_new) @ self._means)
        self.tokens_per_epoch = float((np.asarray(pool.sizes) * self._means)[is_new].sum())
        per_row = new_per_row if is_additive else tokens_per_row
        self.examples_per_epoch = max(1, round(self.tokens_per_epoch / max(per_row, NOTHING)))
        self._num_examples = pool.extent.num_examples(self.examples_per_epoch, self.tokens_per_epoch)
        self._num_steps = -(-self._num_examples // pool.extent.global_batch_size)
        self._num_stretches = min(self._num_steps, MAX_STRETCHES)
        self._starts = [_Start(np.zeros(len(weights), dtype=np.int64), np.zeros(len(weights)))]
        self._lengths = [_Lengths(pool, source) for source in range(len(weights))]
        self._kept: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._lock = Lock()

    def draws(self, positions: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position, and how many draws of that source come before it.

        Args:
            positions: ``(n,)`` uint64, places in the stream of examples of the run, counted from 0.
        """
        steps = positions.astype(np.int64) // self._pool.extent.global_batch_size
        # The stretch that holds a step is the last one that begins at or before it.
        stretches = steps * self._num_stretches // self._num_steps
        sources, draws = np.empty(len(positions), dtype=np.int64), np.empty(len(positions), dtype=np.int64)
        for number in np.unique(stretches).tolist():
            chosen = stretches == number
            places = positions[chosen].astype(np.int64) - self._first_position(number)
            of_stretch, numbers = self._stretch(number)
            sources[chosen], draws[chosen] = of_stretch[places], numbers[places]
        return sources, draws

    def share_at_step(self, step: int) -> float:
        """Share of new tokens that `step`, which counts from 1, aims at."""
        return self._share_at(self._progress((step - 1) * self._num_stretches // self._num_steps))

    def _first_step(self, stretch: int) -> int:
        return -(-stretch * self._num_steps // self._num_stretches)

    def _first_position(self, stretch: int) -> int:
        return min(self._first_step(stretch) * self._pool.extent.global_batch_size, self._num_examples)

    def _progress(self, stretch: int) -> float:
        """Where in the run the middle of a stretch is, from 0 at the first step to 1 at the last."""
        middle = (self._first_step(stretch) + self._first_step(stretch + 1) - 1) / 2
        return middle / max(1, self._num_steps - 1)

    def _shares_at(self, progress: float) -> NDArray[np.float64]:
        """(S,) share of tokens of each source; they add up to 1."""
        share = self._share_at(progress)
        shares = share * self._new + (1 - share) * self._replay
        whole: NDArray[np.float64] = shares / shares.sum()
        return whole

    def _rows_at(self, progress: float) -> NDArray[np.float64]:
        """(S,) share of examples of each source."""
        rows = self._shares_at(progress) / self._means
        whole: NDArray[np.float64] = rows / rows.sum()
        return whole

    def _stretch(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position of a stretch and the number of its draw; batches are built in another thread, too."""
        with self._lock:
            if self._kept is None or self._kept[0] != number:
                for earlier in range(len(self._starts) - 1, number):
                    self._walk(earlier)
                self._kept = (number, *self._walk(number))
            return self._kept[1:]

    def _walk(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Go through a stretch, noting what the next one begins with."""
        start, shares = self._starts[number], self._shares_at(self._progress(number))
        size = self._first_position(number + 1) - self._first_position(number)
        num_tokens = size * float(self._rows_at(self._progress(number)) @ self._means)
        due = _Due(self._lengths, start, shares, num_tokens, self._means)
        sources, draws, tokens = due.first(size)
        if number + 1 == len(self._starts):
            taken = np.bincount(sources, weights=tokens, minlength=len(shares))
            counts = np.bincount(sources, minlength=len(shares))
            self._starts.append(_Start(start.draws + counts, start.owed + shares * tokens.sum() - taken))
        return sources, draws


class _Lengths:
    """Tokens of the draws of one source, which are asked for from front to back."""

    def __init__(self, pool: Pool, source: int) -> None:
        self._pool, self._source = pool, source
        self._first, self._tokens = 0, np.zeros(0)
        # Every pass over a source is an order of its own, and costs time.
        self._ahead = min(READ_AHEAD, pool.sizes[source])

    def of(self, first: int, count: int) -> NDArray[np.float64]:
        """(count,) tokens of the draws from `first` on."""
        if first < self._first or first + count > self._first + len(self._tokens):
            self._first = first
            self._tokens = self._pool.tokens(self._source, np.arange(first, first + max(count, self._ahead)))
        return self._tokens[first - self._first : first - self._first + count]


class _Due:
    """The draws of a stretch in the order in which they are due.

    Args:
        lengths: of each source's draws.
        start: where the stretch begins.
        shares: ``(S,)`` share of tokens of each source.
        num_tokens: tokens that the stretch will have, about.
        means: ``(S,)`` tokens per example.
    """

    def __init__(
        self, lengths: Sequence[_Lengths], start: _Start, shares: NDArray[np.float64], num_tokens: float, means: NDArray[np.float64]
    ) -> None:
        self._lengths, self._start, self._shares = lengths, start, shares
        likely = (shares * num_tokens + np.maximum(start.owed, 0.0)) / means
        self._counts = np.where(shares > 0, np.ceil(1.1 * likely) + 8, 0).astype(np.int64)

    def first(self, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """(source, number of the draw, tokens) of the `size` draws that are due first, each ``(size,)``."""
        while True:
            columns = [self._draws_of(source, count) for source, count in enumerate(self._counts.tolist()) if count]
            times, sources, draws, tokens = (np.concatenate(column) for column in zip(*columns, strict=True))
            chosen = np.argsort(times, kind="stable")[:size]
            taken = np.bincount(sources[chosen], minlength=len(self._shares))
            # A source of which every draw was taken may have had more that were due.
            used_up = (taken == self._counts) & (self._counts > 0)
            if not used_up.any():
                return sources[chosen], draws[chosen], tokens[chosen]
            self._counts[used_up] *= 2

    def _draws_of(self, source: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """The next draws of a source: when they are due, in tokens of all sources since the stretch began; source; draw; tokens."""
        first = int(self._start.draws[source])
        tokens = self._lengths[source].of(first, count)
        # A draw is due when half of it is: the error of rounding to whole examples is then the same to both sides.
        times = (np.cumsum(tokens) - tokens / 2 - self._start.owed[source]) / self._shares[source]
        return times, np.full(count, source, dtype=np.int64), np.arange(first, first + count), tokens
