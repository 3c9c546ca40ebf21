"""What of a model computes when its adapter is off: the base, with whatever of it trains in place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from ftcli.methods.parameter_groups import trained_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

# Under these names a layer with an adapter keeps what computes without it.
_OWN_PARTS = ("base_layer", "original_module")


def trained_in_place(module: nn.Module) -> list[str]:
    """The trained parameters that compute with the adapter off, too: rows of new tokens, whole embeddings, the base's biases."""
    switched = _switched_off(module)
    return [name for name, parameter in trained_parameters(module) if id(parameter) not in switched]


def tensors_without_adapter(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers that compute with the adapter off, by name."""
    switched = _switched_off(module)
    return ((name, tensor) for name, tensor in chain(module.named_parameters(), module.named_buffers()) if id(tensor) not in switched)


def _switched_off(module: nn.Module) -> set[int]:
    """Ids of the tensors that an adapter brought, by the switches on its layers; what is not known to be switched off is not."""
    found: set[int] = set()
    for child in module.modules():
        if hasattr(child, "_disable_adapters"):
            own = {id(tensor) for name in _OWN_PARTS if name in child._modules for tensor in _tensors(child._modules[name])}
            found |= {id(tensor) for tensor in _tensors(child)} - own
        if "prompt_encoder" in child._modules:
            found |= {id(tensor) for tensor in _tensors(child._modules["prompt_encoder"])}
    return found


def _tensors(module: nn.Module | None) -> Iterator[Tensor]:
    return iter(()) if module is None else chain(module.parameters(), module.buffers())
