"""A mixture that balances tasks: every source gets the same share, or one that grows with a power of its size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.data.mixtures.shares import Shares
from ftcli.spec import Spec

if TYPE_CHECKING:
    from ftcli.data.order import Plan
    from ftcli.data.pool import Pool


class Balanced(Spec):
    """Several tasks with equal shares of the examples, however large they are; the weight of a source is a factor on its share.

    An epoch is as many examples as all sources hold together: large sources are not finished in it, small ones repeat.

    Source: sampling by powers of the size as Conneau et al. 2019, arXiv:1911.02116, section 3.1, do for languages.
    """

    kind: Literal["balanced"] = "balanced"
    temperature: float = Field(default=0.0, ge=0, le=1)
    """Power of a source's size that its share grows with, in 0..1: at 0 all are equal, at 1 each has the share of its examples."""

    def plan(self, pool: Pool) -> Plan:
        """Which source each position of the endless stream of examples draws from."""
        rates = tuple(weight * size**self.temperature for size, weight in zip(pool.sizes, pool.weights, strict=True))
        return replace(Shares().plan(replace(pool, weights=rates)), examples_per_epoch=sum(pool.sizes))
