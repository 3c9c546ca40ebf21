"""New layers between the old ones that begin as doing nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftcli.models.grow.growth import Grown, Growth, num_layers_of, restacked, unfit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# What a sub-block adds to the residual stream leaves through one of these, by the names that architectures give them.
_OUTPUTS = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|dense|dense_4h_to_h|down_proj|fc2|w2|wo|Wo|fc_out|output_linear|linear2|attn_out|ff_out|out_lin)"
    r"(\.(weight|bias))?$"
)


class GrowBlocks(Growth):
    """Copies of layers, spread evenly between the old ones, with output projections of zero: each begins as the identity.

    What they learn stands beside what the base knows, which stays as it is when only they train: `method: {kind: freeze, grown: true}`.
    With `method: full` everything trains. Costs memory and time for the new layers, at training and after it (a quarter more
    by default). For a domain that a base should take in without forgetting, where adapters are too small.

    Source: Wu et al. 2024 (LLaMA Pro), arXiv:2401.02415, section 3: 8 blocks in 32 layers; blocks at the bottom or the top alone do
    worse than interleaved ones.
    """

    kind: Literal["blocks"] = "blocks"
    num_blocks: int | None = Field(default=None, ge=1)
    """Layers that are added, at most as many as there are; the default is one for every four. A larger value learns more and costs
    more, at inference, too."""

    def require_fit(self, fields: Mapping[str, Any]) -> None:
        """No more blocks than layers."""
        count = num_layers_of(fields)
        if count is not None:
            self._number(count)

    def grown(self, model: PreTrainedModel, seed: int) -> Grown:
        """The model with the new layers, each behind the layer that it is a copy of."""
        from ftcli.methods.parts import decoder_layers, layer_of

        stack, layers = decoder_layers(model)
        origins, new = interleaved(len(layers), self._number(len(layers)))
        changed = {index: _silenced(model, stack, origins[index]) for index in new}
        result, stack = restacked(model, origins, changed)
        names = frozenset(name for name, _ in result.named_parameters() if layer_of(name, stack) in new)
        listed = ", ".join(map(str, sorted(new)))
        return Grown(result, names, f"{len(new)} blocks added to {len(layers)} layers, as layers {listed}")

    def _number(self, count: int) -> int:
        if self.num_blocks is not None and self.num_blocks > count:
            raise unfit("num_blocks", f"{self.num_blocks} for a model with {count} layers", f"at most {count}")
        return max(1, count // 4) if self.num_blocks is None else self.num_blocks


def interleaved(count: int, num_new: int) -> tuple[list[int], set[int]]:
    """(the origin of every layer, which layers are new): the layers in `num_new` groups, as even as can be, each with a copy of its
    last layer behind it.

    Example:
        >>> interleaved(4, 2), interleaved(3, 1)
        (([0, 1, 1, 2, 3, 3], {2, 5}), ([0, 1, 2, 2], {3}))
    """
    ends = {(group + 1) * count // num_new - 1 for group in range(num_new)}
    origins: list[int] = []
    new: set[int] = set()
    for layer in range(count):
        origins.append(layer)
        if layer in ends:
            new.add(len(origins))
            origins.append(layer)
    return origins, new


def _silenced(model: PreTrainedModel, stack: str, layer: int) -> dict[str, Tensor]:
    """The tensors of a layer through which it adds to the stream, all zero, by the rest of their names."""
    import torch

    prefix = f"{stack}.{layer}."
    own = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    zeroed = {rest: torch.zeros_like(tensor) for rest, tensor in own.items() if _OUTPUTS.search(rest)}
    if not zeroed:
        raise unfit("kind", f"no output projections are known by name in a layer of `{model.config.model_type}`", "kind: depth")
    return zeroed
