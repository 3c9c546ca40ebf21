"""Bottleneck adapters as a method of PEFT: importing this module registers them.

After that `get_peft_model`, `PeftModel.from_pretrained`, `load_adapter`, `set_adapter`, `disable_adapter` and `save_pretrained`
work with them as with any method that PEFT brings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from torch import nn

from ftcli.errors import Problem, RequestError
from ftcli.methods.bottleneck.layer import ADAPTERS, BottleneckLayer, bottleneck_layers
from ftcli.methods.bottleneck.places import Place, decoder_layers, find_places, hidden_size
from ftcli.methods.bottleneck.reduction import factor_of_each

PEFT_NAME = "bottleneck"


def _announce(name: str) -> PeftType:
    """The member `name` of PEFT's enumeration of methods, which is closed."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType[name]


BOTTLENECK = _announce(PEFT_NAME.upper())


@dataclass
class BottleneckConfig(PeftConfig):
    """What a saved adapter says of itself; the fields are those of `methods.bottleneck_settings`."""

    mh_adapter: bool = False
    output_adapter: bool = True
    placement: str = "parallel"
    reduction_factor: float | dict[str, float] = 16.0
    non_linearity: str = "relu"
    init: str = "zero_up"
    scaling: float | str = 1.0
    gating: bool = False
    dropout: float = 0.0
    leave_out: list[int] = field(default_factory=list)
    norm_before: bool = False
    norm_after: bool = False
    target_modules: list[str] | None = None
    """Set when the adapter is put on a model: the names of the sub-blocks that got one."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = BOTTLENECK


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters in its sub-blocks."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Find the places of this adapter; PEFT then calls `_create_and_replace` for each of their names."""
        chosen = chosen_places(model, peft_config)
        num_layers = len(decoder_layers(model)[1])
        factors = factor_of_each(peft_config.reduction_factor, num_layers)
        width = hidden_size(model)
        self._places = {place.name: place for place in chosen}
        self._sizes = {place.name: max(1, int(width // factors[place.layer])) for place in chosen}
        peft_config.target_modules = [place.name for place in chosen]

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._places

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            layer = target
        else:
            place = self._places[current_key]
            layer = BottleneckLayer(target, place)
            layer.set_adapter(self.active_adapters)
            place.stream.watch(place.entry)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, hidden_size(self.model), self._sizes[current_key], peft_config)
        if adapter_name not in self.active_adapters:
            layer.bottleneck_adapters[adapter_name].requires_grad_(False)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name of a tensor in files; PEFT's own takes the adapter's name for the last part but one, here more follows it."""
        return key.replace(f".{ADAPTERS}.{adapter_name}.", f".{ADAPTERS}.", 1)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own would look for the one weight of a layer; a sub-block has several, or none."""
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge: bool = True, *arguments: Any, **options: Any) -> Any:
        """
        Raises:
            RequestError: a merge was asked for.
        """
        if merge:
            raise cannot_merge()
        layers = [layer for _, layer in bottleneck_layers(self.model)]
        unloaded = super()._unload_and_optionally_merge(merge, *arguments, **options)
        for layer in layers:
            layer.place.stream.unwatch()
        return unloaded


def chosen_places(model: nn.Module, config: BottleneckConfig) -> list[Place]:
    """The sub-blocks that the configuration means.

    Raises:
        RequestError: it means none, or leaves out a layer that is not there.
    """
    places = find_places(model)
    num_layers = len(decoder_layers(model)[1])
    beyond = sorted(layer for layer in config.leave_out if not 0 <= layer < num_layers)
    if beyond:
        problem = Problem("method.leave_out", f"layer {beyond[0]} does not exist", f"layers are 0 to {num_layers - 1}")
        raise RequestError("the method does not fit the model", [problem])
    wanted = {"attention": config.mh_adapter, "feed_forward": config.output_adapter}
    chosen = [place for place in places if wanted[place.kind] and place.layer not in config.leave_out]
    if not chosen:
        kinds = " and ".join(sorted({place.kind for place in places}))
        what = f"no layer gets an adapter ({num_layers} layers with {kinds}; leave_out: {sorted(config.leave_out)})"
        raise RequestError("the method does not fit the model", [Problem("method", what, "mh_adapter, output_adapter, leave_out")])
    return chosen


def cannot_merge() -> RequestError:
    """Why there are no plain weights, and what to do."""
    what = "a bottleneck adapter has a non-linearity between its matrices, so no plain weight computes the same"
    hint = "use the base with the adapter folder (`ftcli generate RUN`, or PeftModel.from_pretrained); kind: lora can be merged"
    return RequestError("bottleneck adapters cannot be merged", [Problem("method", what, hint)])


register_peft_method(name=PEFT_NAME, config_cls=BottleneckConfig, model_cls=BottleneckModel, prefix=BottleneckModel.prefix)
