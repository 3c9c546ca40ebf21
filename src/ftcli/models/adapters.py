"""Several adapters over one base model in one process, one of them in place at a time.

Putting an adapter on a model replaces some of its modules. Here the replaced modules and their replacements are kept, and `use`
puts one set in: every adapter sees the plain base and nothing of the others, so that it computes what it computes alone, whatever
its kind. A switch costs one assignment a module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ftcli.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

BASE = "base"
"""What the model without an adapter is called."""


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """An adapter: what answers, and which modules of the base it replaces by which."""

    module: nn.Module
    replaced: tuple[tuple[str, nn.Module, nn.Module], ...]


class Adapters:
    """A base model and adapters by name.

    Args:
        base: a plain model; it belongs to this object, which changes it in place.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self._held: dict[str, _Held] = {BASE: _Held(base, ())}
        self._in_place = BASE

    @property
    def names(self) -> Sequence[str]:
        """Those that can be used, the plain base first."""
        return list(self._held)

    def add(self, name: str, load: Callable[[PreTrainedModel], nn.Module]) -> None:
        """Load an adapter, which is not in place afterwards.

        Args:
            load: puts it on a base, in place, and returns what is to be called.
        """
        if name in self._held:
            raise UsageError(f"two adapters are called `{name}`" if name != BASE else f"`{BASE}` is the model without an adapter")
        self.use(BASE)
        before = dict(self.base.named_modules())
        module = load(self.base).eval()
        replaced: list[tuple[str, nn.Module, nn.Module]] = []
        for path, child in self.base.named_modules():
            is_inside = any(path.startswith(f"{other}.") for other, _, _ in replaced)
            if path in before and before[path] is not child and not is_inside:
                replaced.append((path, before[path], child))
        self._held[name] = _Held(module, tuple(replaced))
        self._in_place = name
        self.use(BASE)
        # PEFT takes a model with it for one that has an adapter
        if "peft_config" in self.base.__dict__:
            del self.base.peft_config

    def use(self, name: str) -> nn.Module:
        """What computes with this adapter, until another one is used.

        Raises:
            UsageError: there is none of this name.
        """
        if name not in self._held:
            hint = did_you_mean(name, self.names) or f"adapters: {', '.join(self.names)}"
            raise UsageError(f"there is no adapter `{name}`", hint=hint)
        if name != self._in_place:
            for path, original, _ in self._held[self._in_place].replaced:
                _put(self.base, path, original)
            for path, _, replacement in self._held[name].replaced:
                _put(self.base, path, replacement)
            self._in_place = name
        return self._held[name].module


def _put(model: Any, path: str, module: nn.Module) -> None:
    """Set a submodule; in a list of layers, too."""
    parent, _, last = path.rpartition(".")
    cast("nn.Module", model.get_submodule(parent))._modules[last] = module
