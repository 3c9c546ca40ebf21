"""L2-SP: weight decay towards the start instead of zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.objectives.regularize.regularizer import RegularizerSettings

if TYPE_CHECKING:
    from ftcli.objectives.regularize.regularizer import AtWork, RegularizeContext


class L2SP(RegularizerSettings):
    """weight / 2 times the squared distance of the trained weights from where they started: ½ weight ‖θ - θ₀‖².

    Costs a copy of the trained weights and one pass over them a micro-batch; no forward pass and no data. Under an adapter the
    trained weights are the adapter's, and their start is its own: LoRA's A is drawn to its initial value and B to zero. Take it
    where no data of the base's kind is at hand; every weight is held alike, needed or not, so `kl` on such data forgets less for
    the same gain. The best weight goes with the learning rate and the number of steps: try 0.01, 0.1 and 1.

    Source: Li, Grandvalet and Davoine 2018, arXiv:1802.01483, equation 3, with its term for a fresh head; `decoupled` acts on weights
    as the decay of Loshchilov and Hutter 2017, arXiv:1711.05101, does, towards θ₀ in place of 0.
    """

    kind: Literal["l2_sp"] = "l2_sp"
    weight: float = Field(default=0.1, ge=0)
    """A larger value holds the weights closer to their start, and 0 costs nothing."""
    head_weight: float = Field(default=0.01, ge=0)
    """Pull of a fresh classification head towards zero, which has no start worth keeping."""
    decoupled: bool = False
    """Move the weights after each update by lr x weight of the way back, untouched by the optimizer's scaling, instead of adding to
    the loss."""

    def build(self, name: str, context: RegularizeContext) -> AtWork:
        """The pull towards the start."""
        from ftcli.objectives.regularize.pull import DecoupledPull, Pull, Pulled

        start = context.start()
        pulled = [
            Pulled(key, parameter, None, self.head_weight) if key in context.head_names else Pulled(key, parameter, value, self.weight)
            for key, parameter, value in start.pairs()
        ]
        return DecoupledPull(name, pulled) if self.decoupled else Pull(name, pulled)
