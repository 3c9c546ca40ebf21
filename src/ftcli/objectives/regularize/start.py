"""The trained weights as they were when the run began, and a model that computes with them for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ftcli.methods.parameter_groups import trained_parameters

if TYPE_CHECKING:
    from typing import Self


class Start:
    """One copy of the trained parameters' first values, for all that hold on to them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        self.values = {name: values[name].to(p.device, p.dtype, copy=True) for name, p in self._parameters.items()}

    @classmethod
    def of(cls, module: nn.Module, names: Collection[str] | None = None) -> Self:
        """What the trained parameters of `module` are now.

        Args:
            names: of these only; None for all.
        """
        parameters = {name: p for name, p in trained_parameters(module) if names is None or name in names}
        return cls(parameters, {name: parameter.detach() for name, parameter in parameters.items()})

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Name, parameter and first value of all that trains."""
        return ((name, parameter, self.values[name]) for name, parameter in self._parameters.items())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The parameters have their first values until the end of the block; what was computed before keeps its graph."""
        pairs = [(parameter, value) for _, parameter, value in self.pairs()]
        with swapped(pairs):
            yield


@contextmanager
def swapped(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Each parameter has another value until the end of the block.

    Autocast keeps the casts of parameters by their identity, which does not change here: it must neither use nor keep any.
    """
    own = [parameter.data for parameter, _ in pairs]
    was_cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        for parameter, value in pairs:
            parameter.data = value
        yield
    finally:
        for (parameter, _), value in zip(pairs, own, strict=True):
            parameter.data = value
        torch.set_autocast_cache_enabled(was_cached)
