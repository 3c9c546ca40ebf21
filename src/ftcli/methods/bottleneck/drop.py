"""AdapterDrop: the adapters of the first layers left out, for a step of training, for measuring, or for good.

Source: Rücklé et al. 2021, arXiv:2010.11918.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError
from ftcli.methods.bottleneck.layer import ADAPTERS, bottleneck_layers
from ftcli.methods.bottleneck.places import decoder_layers
from ftcli.methods.parameter_groups import rest

if TYPE_CHECKING:
    from torch import Tensor, nn


def num_layers_of(module: nn.Module) -> int:
    """Decoder layers of the adapted model."""
    return len(decoder_layers(module.get_base_model())[1])  # type: ignore[operator]


def last_layer_with_adapter(module: nn.Module) -> int:
    """Counted from 0; as long as this one stays, something trains."""
    return layers_with_adapter(module)[-1]


def layers_with_adapter(module: nn.Module) -> list[int]:
    """Their numbers from 0, ascending."""
    return sorted({layer.place.layer for _, layer in bottleneck_layers(module)})


def drop_first(module: nn.Module, count: int) -> None:
    """Train the next step without the adapters of the first `count` layers."""
    for _, layer in bottleneck_layers(module):
        layer.is_dropped = layer.place.layer < count
        for parameter in layer.bottleneck_adapters.parameters():
            rest(parameter, layer.is_dropped)


def skip_first(module: nn.Module, count: int) -> None:
    """Compute without the adapters of the first `count` layers, until told otherwise."""
    for _, layer in bottleneck_layers(module):
        layer.is_skipped = layer.place.layer < count


def without_first(config: Mapping[str, Any], tensors: Mapping[str, Tensor], count: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a saved adapter without those of the first `count` layers.

    Raises:
        RequestError: nothing would be left.
    """
    kept_names = [name for name in config["target_modules"] if layer_of(name) >= count]
    if not kept_names:
        last = max(map(layer_of, config["target_modules"]))
        problem = Problem("--layers", f"{count} drops every adapter", f"the last adapter is in layer {last}: at most {last}")
        raise RequestError("nothing would be left of the adapter", [problem])
    kept = {name: tensor for name, tensor in tensors.items() if layer_of(name.partition(f".{ADAPTERS}.")[0]) >= count}
    leave_out = sorted({*config["leave_out"], *range(count)})
    return {**config, "leave_out": leave_out, "target_modules": kept_names}, kept


def layer_of(sub_block: str) -> int:
    """The layer of a sub-block by its name: the first number in it.

    Example:
        >>> layer_of("model.layers.11.block_sparse_moe")
        11
    """
    return next(int(part) for part in sub_block.split(".") if part.isdigit())
