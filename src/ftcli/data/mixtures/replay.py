"""A mixture of new text and replay: the share of new tokens is fixed, or rises over the steps, and holds in every stretch of the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import ConfigDict, Field

from ftcli.spec import Spec

if TYPE_CHECKING:
    from ftcli.data.order import Plan
    from ftcli.data.pool import Pool

NUM_STAIRS = 4


class ShareSchedule(Spec):
    """The share of new tokens moves from one value to another over the steps of the run.

    Source: Pai, Designing LLM Applications, chapter 7, for beginning at a quarter and ending at four fifths.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    first: float = Field(default=0.25, ge=0, le=1, alias="from")
    """Share of new tokens at the first step, in 0..1."""
    to: float = Field(default=0.80, gt=0, le=1)
    """Share of new tokens at the last step, in 0..1; a larger value learns more of the new text and forgets more of the old."""
    shape: Literal["linear", "cosine", "steps"] = "linear"
    """How it moves: `linear`, `cosine` (slowly at both ends), or `steps` (four equal stairs)."""

    def share_at(self, progress: float) -> float:
        """The share at a point of the run, from 0 at the first step to 1 at the last.

        Example:
            >>> [round(ShareSchedule().share_at(progress), 3) for progress in (0.0, 0.5, 1.0)]
            [0.25, 0.525, 0.8]
        """
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        if self.shape == "steps":
            progress = min(int(progress * NUM_STAIRS), NUM_STAIRS - 1) / (NUM_STAIRS - 1)
        return self.first + (self.to - self.first) * progress


class Replay(Spec):
    """New text and replay in a share of tokens that is fixed or follows a schedule; several sources of a role share by `weight`.

    What it is for: further training on text of another kind, where what the model knew before has to stay.

    Source: compute-equivalent replay as Ibrahim et al. 2024, arXiv:2403.08763, section 4.2.
    """

    kind: Literal["replay"] = "replay"
    share_of_new: Annotated[float, Field(gt=0, le=1)] | ShareSchedule = ShareSchedule()
    """Share of new tokens in 0..1, for the whole run or as a schedule `{from: 0.25, to: 0.80, shape: linear}` over its steps."""
    accounting: Literal["replace", "add"] = "replace"
    """What `epochs` and `max_tokens` count: with `replace` replay takes the place of new tokens and the run costs what it would
    without, with `add` new tokens are all seen and replay comes on top."""

    def share_at(self, progress: float) -> float:
        """Share of new tokens at a point of the run, in 0..1."""
        return self.share_of_new.share_at(progress) if isinstance(self.share_of_new, ShareSchedule) else self.share_of_new

    def plan(self, pool: Pool) -> Plan:
        """Which source each position of the stream of examples draws from."""
        from ftcli.data.token_clock import TokenClock

        return TokenClock(pool, self.share_at, is_additive=self.accounting == "add")
