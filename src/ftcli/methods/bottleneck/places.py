"""Where bottleneck adapters go in a decoder: its layers, their sub-blocks, and the residual stream beside them, found by structure.

A decoder layer is an element of the module list that has one element a hidden layer. What of it holds matrices is a sub-block:
attention where its `forward` takes an attention mask, else feed-forward (a mixture of experts is one, too). What holds vectors at
most is a norm. No list of model classes is needed.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

Kind = Literal["attention", "feed_forward"]


@dataclass(eq=False)
class Stream:
    """The residual stream of one decoder layer, told by its norms: what a sub-block reads is what a norm gave, and that norm read
    the stream. Where no norm stands before a sub-block, the sub-block reads the stream itself.

    The tensors are held weakly: the layer keeps the stream until it has added to it, and nothing is kept alive longer.
    """

    norms: list[nn.Module]
    _seen: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = field(default_factory=dict)
    _entered: weakref.ref[Tensor] | None = None
    """The stream at the entry of a feed-forward network that is not one module."""
    _handles: list[RemovableHandle] = field(default_factory=list)

    def watch(self, entry: nn.Module | None) -> None:
        """Look at every norm, and at `entry` where the sub-block's first module is not the one that carries the adapter."""
        if not self._handles:
            self._handles = [norm.register_forward_hook(self._note) for norm in self.norms]
        if entry is not None:
            self._handles.append(entry.register_forward_pre_hook(self._note_entry))

    def unwatch(self) -> None:
        """Leave the layer's modules as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before(self, sub_block_input: Tensor) -> Tensor:
        """The stream from which `sub_block_input` was made."""
        for read, gave in self._seen.values():
            found = read()
            if gave() is sub_block_input and found is not None:
                return found
        return sub_block_input

    def entered(self) -> Tensor | None:
        """The stream as it was when the entry module was called."""
        return None if self._entered is None else self._entered()

    def _note(self, norm: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self._seen[id(norm)] = (weakref.ref(inputs[0]), weakref.ref(output))

    def _note_entry(self, entry: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._entered = weakref.ref(self.before(inputs[0]))


@dataclass(frozen=True, eq=False)
class Place:
    """One sub-block of one layer, where an adapter may go."""

    layer: int
    """Counted from 0."""
    kind: Kind
    name: str
    """Of the module whose output the sub-block adds to the stream."""
    entry: nn.Module | None
    """The sub-block's first module, where it is another one (OPT has no module for its feed-forward network)."""
    stream: Stream


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers.

    Raises:
        RequestError: no list of modules has as many elements as the configuration has hidden layers.
    """
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    # The outermost comes first: experts and heads are lists inside of it.
    for name, module in lists:
        if len(module) == count:
            return name, module
    found = ", ".join(f"`{name}` of {len(module)}" for name, module in lists[:5]) or "none"
    problem = Problem("method", f"the model has no list of {count} decoder layers (lists of modules: {found})")
    raise RequestError("bottleneck adapters do not fit the model", [problem])


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def find_places(model: nn.Module) -> list[Place]:
    """Every sub-block of every layer, in the model's order.

    Raises:
        RequestError: the layers cannot be told apart into attention and feed-forward.
    """
    list_name, layers = decoder_layers(model)
    places = [place for index, layer in enumerate(layers) for place in _places_in(f"{list_name}.{index}", index, layer)]
    if not places:
        problem = Problem("method", f"`{list_name}` holds no sub-block with matrices")
        raise RequestError("bottleneck adapters do not fit the model", [problem])
    return places


def _places_in(prefix: str, index: int, layer: nn.Module) -> Iterator[Place]:
    children = {name: _unwrapped(child) for name, child in layer.named_children()}
    blocks = {name: child for name, child in children.items() if _has_matrix(child)}
    norms = [child for name, child in children.items() if name not in blocks and _is_norm(child)]
    stream = Stream(norms)
    attention = [name for name, child in blocks.items() if _takes_mask(child)]
    # Of several attentions the first is the decoder's own; the others look at an encoder.
    if attention:
        yield Place(index, "attention", f"{prefix}.{attention[0]}", None, stream)
    rest = [name for name in blocks if name not in attention]
    if rest:
        name = _feed_forward(prefix, rest, blocks)
        entry = blocks[rest[0]] if name != rest[0] else None
        yield Place(index, "feed_forward", f"{prefix}.{name}", entry, stream)


def _feed_forward(prefix: str, names: Sequence[str], blocks: dict[str, nn.Module]) -> str:
    """The one whose output is added to the stream: the only one, or the last of the linear layers that stand one by one.

    Raises:
        RequestError: there are several.
    """
    if len(names) == 1 or all(_is_linear(blocks[name]) for name in names):
        return names[-1]
    listed = ", ".join(f"`{name}`" for name in names)
    problem = Problem("method.output_adapter", f"`{prefix}` has several feed-forward modules: {listed}", "output_adapter: false")
    raise RequestError("bottleneck adapters do not fit the model", [problem])


def adds_stream(module: nn.Module) -> bool:
    """Does the sub-block add the residual stream itself (BLOOM, MPT)?"""
    return "residual" in inspect.signature(module.forward).parameters


def _unwrapped(module: nn.Module) -> nn.Module:
    """The base's own module, without adapters that are there already."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _is_norm(module: nn.Module) -> bool:
    """Vectors only, or a norm without any (OLMo)."""
    return any(True for _ in module.parameters()) or "norm" in type(module).__name__.lower()


def _takes_mask(module: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(module.forward).parameters


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
