"""A mixture for text that is still being tokenised: files are read from front to back, and shuffled a window at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.data.mixtures.shares import Shares
from ftcli.spec import Spec

if TYPE_CHECKING:
    from ftcli.data.mixtures.shares import SharesPlan
    from ftcli.data.pool import Pool


class Stream(Spec):
    """Training begins when the first window of every source is tokenised; the order is the same where all was tokenised before.

    The weight of a source, over the sum of all weights, is its share of the examples. What it is for: a first pass over a corpus that
    takes long to tokenise. What it costs: an example is only shuffled among its neighbours, and duplicates and overlap with the
    evaluation data are not looked for before training.
    """

    kind: Literal["stream"] = "stream"
    window: int = Field(default=32768, ge=1)
    """Examples in a row that are shuffled among themselves; a larger value mixes better and begins later."""

    def plan(self, pool: Pool) -> SharesPlan:
        """Which source each position of the endless stream of examples draws from."""
        # How many examples there are may not be known yet: what a run calls an epoch is all of it.
        return replace(Shares().plan(pool), examples_per_epoch=pool.extent.num_examples(1, 1.0))
