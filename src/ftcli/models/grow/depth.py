"""More layers by running some of them twice: quick to train on, but another function at first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftcli.models.grow.growth import Grown, Growth, num_layers_of, restacked, unfit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GrowDepth(Growth):
    """Two copies of the model on top of each other, the last layers of the lower and the first of the upper left out at the seam.

    The outputs change at once and come back with training, for which `method: full` is meant. Costs nearly twice the memory and
    time. For a larger model from a good small one, with many tokens to train on; with few, `blocks` loses nothing.

    Source: Kim et al. 2023 (SOLAR), arXiv:2312.15166, section 2: 8 of 32 layers are left out of each copy, which gives 48.
    """

    kind: Literal["depth"] = "depth"
    left_out: int | None = Field(default=None, ge=0)
    """Layers left out of each copy at the seam; the default is a quarter of them. A larger value gives fewer layers and a smaller jump."""

    keeps_outputs: ClassVar[bool] = False

    def require_fit(self, fields: Mapping[str, Any]) -> None:
        """Less than half of the layers are left out."""
        count = num_layers_of(fields)
        if count is not None:
            self._number(count)

    def _number(self, count: int) -> int:
        left_out = count // 4 if self.left_out is None else self.left_out
        if 2 * left_out >= count:
            what = f"{left_out} of {count} layers: the result would have {2 * max(0, count - left_out)}"
            raise unfit("left_out", what, f"less than half of them, {count / 2:g}")
        return left_out

    def grown(self, model: PreTrainedModel, seed: int) -> Grown:
        """The model with 2 * (layers - left_out) layers."""
        from ftcli.methods.parts import decoder_layers, layer_of

        count = len(decoder_layers(model)[1])
        left_out = self._number(count)
        origins = [*range(count - left_out), *range(left_out, count)]
        result, stack = restacked(model, origins)
        layers = {name: layer_of(name, stack) for name, _ in result.named_parameters()}
        names = frozenset(name for name, layer in layers.items() if layer is not None and layer >= count - left_out)
        upper = f"layers {left_out} to {count - 1} once more above layer {count - left_out - 1}"
        return Grown(result, names, f"{len(origins)} layers from {count}: {upper}")
