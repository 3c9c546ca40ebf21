"""EWC: what mattered to the base is held more firmly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ftcli.data.formats import Format
from ftcli.data.sources import Source
from ftcli.objectives.regularize.regularizer import RegularizerSettings
from ftcli.spec import LocalPath, Spec

if TYPE_CHECKING:
    from ftcli.objectives.regularize.regularizer import AtWork, RegularizeContext


class FisherRows(Spec):
    """Rows of the kind that must not be lost; they are not trained on."""

    source: Source
    """Where the rows come from."""
    format: Format | None = None
    """How a row becomes an example; left out, it is detected from the columns."""


class EWC(RegularizerSettings):
    """weight / 2 times the squared distance from the start, each weight by its Fisher information: ½ λ Σ Fᵢ (θᵢ - θ₀ᵢ)².

    F is measured before the first step, on data of the kind that must not be lost, as the mean squared gradient of a target's
    log-probability; with it the penalty is, for small moves and as far as a diagonal goes, the nats by which the base's own
    predictions change, so that weight 1 sets a nat of the old against a nat of the new. The diagonal leaves out how weights act
    together, and much larger weights are usual: on the embedded model the penalty was a fiftieth of what was lost; try 10, 100 and
    1000. Costs `examples` backward passes once, a copy of the trained weights and half a copy for F. Under an adapter F is that of
    the adapter's weights at their start: while LoRA's B is zero nothing depends on A, whose F is zero.

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3; `labels: model` is the Fisher information proper, see Kunstner et
    al. 2019, arXiv:1905.12558; `earlier` and `decay` are online EWC: Schwarz et al. 2018, arXiv:1805.06370, section 2.2.
    """

    kind: Literal["ewc"] = "ewc"
    weight: float = Field(default=1.0, ge=0)
    """λ; a larger value holds what mattered more firmly, and 0 costs nothing."""
    rows: FisherRows | None = None
    """What to measure F on; the default is the training sources of `role: replay`."""
    examples: int = Field(default=256, ge=1)
    """Measure on at most so many examples, drawn evenly; a larger value makes F less noisy."""
    labels: Literal["model", "data"] = "model"
    """Take the gradient for tokens that the model draws itself, or for those that the data has (the empirical Fisher)."""
    earlier: LocalPath | None = None
    """An earlier run with `ewc` that this one goes on from, or that began with the same weights: its F is added, times `decay`."""
    decay: float = Field(default=0.95, ge=0, le=1)
    """What remains of the earlier run's F; at 1 nothing is ever forgiven, at 0 only this run's data counts."""

    def build(self, name: str, context: RegularizeContext) -> AtWork:
        """The pull towards the start, as strong as F says."""
        from ftcli.objectives.regularize.pull import Pull, Pulled

        fisher, start = context.fisher(self), context.start()
        return Pull(name, [Pulled(key, parameter, value, self.weight, fisher[key]) for key, parameter, value in start.pairs()])
