"""Bottleneck adapters: the first parameter-efficient method, in all its placements, with AdapterDrop."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ftcli.errors import Problem, RequestError
from ftcli.methods.bottleneck_settings import BottleneckSettings
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext


class NoDrop(Spec):
    """Every layer that has an adapter uses it in every step."""

    kind: Literal["none"] = "none"


class FixedDrop(Spec):
    """The first layers never get an adapter: what is trained is one adapter for this number of layers without."""

    kind: Literal["fixed"] = "fixed"
    layers: int = Field(default=1, ge=0)
    """How many of the first layers have none; a larger value makes training and answering faster."""


class RandomDrop(Spec):
    """Every step trains without the adapters of its first n layers, n drawn anew: the result bears to be cut anywhere later."""

    kind: Literal["random"] = "random"
    layers: int | None = Field(default=None, ge=1)
    """The largest n; every number from 0 to it is as likely. The default leaves at least the last adapter."""


Drop = Annotated[NoDrop | FixedDrop | RandomDrop, Field(discriminator="kind")]


class BottleneckAdapter(BottleneckSettings):
    """Small networks with a narrow middle in every layer of a frozen base.

    2 * width * (width / reduction_factor) parameters in each place, and a share of the forward pass that stays (a tenth on the embedded
    model), as there is nothing to merge. Take it to keep many tasks on one base, to drop lower layers (`drop`), or to compare with the
    literature; else `lora`, which did better on the embedded order task: 0.04 nats a target after 60 steps with 0.56 on the base's own
    stories, against 0.07 and 0.73 of `houlsby`, 0.14 and 1.06 of `pfeiffer` with half of its parameters, 0.04 and 1.04 of `parallel`
    with four times as many (one seed each). The default learning rate is a compromise there, scaled to width 4096: `houlsby` has 0.12
    and 0.63 at 4e-3, 0.07 and 0.73 at the default of 6.4e-3, 0.03 and 1.46 at 1.6e-2. What an adapter adds grows with its scaling,
    so the rate is divided by it.
    """

    kind: Literal["adapter"] = "adapter"
    drop: Drop = NoDrop()
    """AdapterDrop: lower layers that train without their adapters."""

    rests: ClassVar[bool] = True

    def layers_without(self) -> set[int]:
        """Layers that get no adapter: those left out, and the first ones where `drop` is fixed."""
        first = self.drop.layers if isinstance(self.drop, FixedDrop) else 0
        return set(self.leave_out) | set(range(first))

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """`model` with adapters in its sub-blocks; with `init: zero_up` what it computes is unchanged.

        Raises:
            RequestError: the model's layers cannot be told apart, or the settings name layers that are not there.
        """
        from ftcli.methods.bottleneck.places import decoder_layers

        most = len(decoder_layers(model)[1]) - 1
        layers = 0 if isinstance(self.drop, NoDrop) else self.drop.layers or 0
        if layers > most:
            problem = Problem("method.drop.layers", f"found {layers}, allowed: at most {most}", "the last layer keeps its adapter")
            raise RequestError("the method does not fit the model", [problem])
        module = super().attach(model, context)
        if isinstance(self.drop, RandomDrop):
            _require_some_to_drop(module, self.drop)
        return module

    def before_step(self, module: nn.Module, step: int, num_steps: int, seed: int) -> None:
        """Let the adapters of the step's first layers rest.

        Source: Rücklé et al. 2021, arXiv:2010.11918, section 3.2: n is drawn anew for every batch.
        """
        if not isinstance(self.drop, RandomDrop):
            return
        from ftcli.methods.bottleneck.drop import drop_first, last_layer_with_adapter

        most = last_layer_with_adapter(module)
        if self.drop.layers is not None:
            most = min(most, self.drop.layers)
        drop_first(module, random.Random(f"{seed}/adapter-drop/{step}").randint(0, most))


def _require_some_to_drop(module: nn.Module, drop: RandomDrop) -> None:
    from ftcli.methods.bottleneck.drop import layers_with_adapter

    layers = layers_with_adapter(module)
    most = layers[-1] if drop.layers is None else drop.layers
    if len(layers) == 1 or layers[0] >= most:
        what = f"drops no adapter: those that are there are in layers {', '.join(map(str, layers))}"
        raise RequestError("the method does not fit the model", [Problem("method.drop", what, "leave_out, drop.layers")])
