"""The bottleneck itself, and the wrapped sub-block that adds it.

Legend: ``D`` width of the residual stream, ``r`` width of the bottleneck, ``...`` any leading shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from ftcli.methods.bottleneck.places import Place, adds_stream

if TYPE_CHECKING:
    from ftcli.methods.bottleneck.tuner import BottleneckConfig

ADAPTERS = "bottleneck_adapters"
_NARROW_STD, _BERT_STD = 1e-2, 2e-2

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "swish": functional.silu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "linear": lambda x: x,
}


class Bottleneck(nn.Module):
    """What an adapter adds: scaling * up(f(down(x))), between optional norms, with dropout and a gate.

    The gate is one number a token. The reference averages it over the sequence, which in a decoder would let a token see what
    comes after it.
    """

    def __init__(self, width: int, size: int, config: BottleneckConfig) -> None:
        """
        Args:
            width: D.
            size: r.
        """
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        self.non_linearity = NON_LINEARITIES[config.non_linearity]
        self.norm_before = nn.LayerNorm(width) if config.norm_before else None
        self.norm_after = nn.LayerNorm(width) if config.norm_after else None
        self.gate = nn.Linear(width, 1) if config.gating else None
        self.scaling: float | nn.Parameter = nn.Parameter(torch.ones(1)) if config.scaling == "learned" else float(config.scaling)
        self.dropout = nn.Dropout(config.dropout)
        _set_initial(self.down, self.up, config.init)
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=_BERT_STD)
            nn.init.zeros_(self.gate.bias)

    def forward(self, read: Tensor) -> Tensor:
        """``(..., D)`` what is added, for what is read."""
        normed = read if self.norm_before is None else self.norm_before(read)
        added = self.dropout(self.projected(normed) * self.scaling)
        if self.gate is not None:
            added = added * torch.sigmoid(self.gate(read))
        return added if self.norm_after is None else cast("Tensor", self.norm_after(added))

    def projected(self, x: Tensor) -> Tensor:
        """``(..., D)`` through the bottleneck."""
        return cast("Tensor", self.up(self.non_linearity(self.down(x))))

    def plain_state(self) -> dict[str, Tensor]:
        """The tensors of one bottleneck that computes what this one does in evaluation."""
        return self.state_dict()


def _set_initial(down: nn.Linear, up: nn.Linear, init: str) -> None:
    """Initial weights; every choice is near the identity, `zero_up` is the identity.

    Source: `zero_up` He et al. 2021, arXiv:2110.04366, section 4.1; `houlsby` Houlsby et al. 2019, arXiv:1902.00751, section 3.6
    (normal with deviation 0.01, cut at two deviations); `bert` the first weights of BERT, which AdapterHub takes.
    """
    if init == "zero_up":
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
    for linear in (down, up):
        nn.init.zeros_(linear.bias)
        if init == "bert":
            nn.init.normal_(linear.weight, std=_BERT_STD)
        elif init == "houlsby":
            nn.init.trunc_normal_(linear.weight, std=_NARROW_STD, a=-2 * _NARROW_STD, b=2 * _NARROW_STD)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A sub-block of the base with bottleneck adapters, of which those that are active are added to what it gives."""

    adapter_layer_names = (ADAPTERS,)

    def __init__(self, base_layer: nn.Module, place: Place) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.place = place
        self.adds_stream = adds_stream(base_layer)
        self.bottleneck_adapters = nn.ModuleDict()
        self.reads: dict[str, str] = {}
        self.is_dropped = False
        """No adapter is added in training, until the next step says otherwise."""
        self.is_skipped = False
        """No adapter is added at all."""
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, width: int, size: int, config: BottleneckConfig) -> None:
        """Add an adapter of this name, of bottleneck width `size`."""
        bottleneck = Bottleneck(width, size, config)
        self.bottleneck_adapters[adapter] = bottleneck
        self.reads[adapter] = config.placement
        weight = next(self.base_layer.parameters())
        # A quantised base computes in another dtype than it stores.
        dtype = weight.dtype if weight.dtype.is_floating_point else None
        if weight.device.type != "meta" and bottleneck.down.weight.device.type != "meta":
            bottleneck.to(weight.device, dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the base's sub-block gives (a tensor, or a tuple whose first element is added to the stream), adapted."""
        names = self._names_in_use()
        if not names:
            return self.base_layer(*arguments, **options)
        stream = self._stream(arguments, options) if self.adds_stream or any(self.reads[name] != "output" for name in names) else None
        output = self.base_layer(*arguments, **options)
        given = output[0] if isinstance(output, tuple) else output
        for name in names:
            given = given + self._added(name, given, stream)
        return (given, *output[1:]) if isinstance(output, tuple) else given

    def _names_in_use(self) -> list[str]:
        if self.disable_adapters or self.is_skipped or (self.training and self.is_dropped):
            return []
        return [name for name in self.active_adapters if name in self.bottleneck_adapters]

    def _stream(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        """The residual stream before this sub-block."""
        if self.place.entry is not None:
            entered = self.place.stream.entered()
            assert entered is not None
            return entered
        read = arguments[0] if arguments else options.get("hidden_states", next(iter(options.values())))
        return self.place.stream.before(read)

    def _added(self, name: str, given: Tensor, stream: Tensor | None) -> Tensor:
        reads = self.reads[name]
        if reads == "parallel":
            assert stream is not None
            read = stream
        elif reads == "stream":
            read = given if self.adds_stream else given + cast("Tensor", stream)
        else:
            read = given - stream if self.adds_stream and stream is not None else given
        bottleneck = cast("Bottleneck", self.bottleneck_adapters[name])
        added: Tensor = bottleneck(read.to(next(bottleneck.parameters()).dtype))
        return added.to(given.dtype)

    def __getattr__(self, name: str) -> Any:
        """What a decoder layer asks of its sub-block (`is_sliding`, `layer_idx`) is the base's to answer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def bottleneck_layers(module: nn.Module) -> Iterator[tuple[str, BottleneckLayer]]:
    """Every sub-block that carries adapters, by its name in `module`, in the model's order."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, BottleneckLayer))
