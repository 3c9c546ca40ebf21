"""AdaMix: bottleneck adapters trained as a mixture of experts, averaged to one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftcli.methods.bottleneck_settings import BottleneckSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.layout.model import Penalty
    from ftcli.methods.context import AttachContext


class Adamix(BottleneckSettings):
    """Several bottlenecks in every place, one of them at random in every step; what is saved is their average, one plain adapter.

    Costs a second forward pass (for the consistency of two routes) and the experts' weights in training, nothing afterwards. Each
    expert sees a part of the steps only, so it needs more of them than a plain adapter: after 60 steps of the embedded order task the
    average stood at 0.15 nats a target, where the plain adapter had 0.07. For long trainings on small data sets, where the paper reports
    a gain over one adapter, which was not measured here. The learning rate is the plain adapter's.

    It does not beat the untuned base on babyllama-361 with 20 labels in 120 steps (0 % after as before, loss 6.4 to 1.8; docs/methods.md).

    Source: Wang et al. 2022, arXiv:2205.12410.
    """

    kind: Literal["adamix"] = "adamix"
    num_experts: int = Field(default=4, ge=1)
    """Bottlenecks in every place; with 1 it is a plain adapter."""
    sharing: Literal["down", "up", "none"] = "up"
    """The projection that all experts of a place have in common."""
    consistency: float = Field(default=1.0, ge=0)
    """Weight of the disagreement of two routes through the experts, which costs a second forward pass; 0 leaves it out."""

    rests: ClassVar[bool] = True

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """`model` with a mixture in each of its sub-blocks; with `init: zero_up` what it computes is unchanged."""
        module = super().attach(model, context)
        from ftcli.methods.bottleneck.mixture import multiply

        multiply(module, self.num_experts, self.sharing)
        return module

    def before_step(self, module: nn.Module, step: int, num_steps: int, seed: int) -> None:
        """Draw the step's two routes; what neither takes rests."""
        from ftcli.methods.bottleneck.mixture import draw_routes

        draw_routes(module, random.Random(f"{seed}/adamix/{step}"), 2 if self.penalties() else 1)

    def penalties(self) -> Sequence[Penalty]:
        """The disagreement of the step's two routes, where there can be one."""
        if self.num_experts == 1 or self.consistency == 0:
            return ()
        from ftcli.methods.bottleneck.mixture import Consistency

        return (Consistency(self.consistency),)
