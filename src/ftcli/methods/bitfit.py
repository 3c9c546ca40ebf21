"""BitFit: only biases move. Source: Zaken et al. 2021, arXiv:2106.10199."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal

from ftcli.errors import Problem, RequestError
from ftcli.methods.subset import Subset

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from ftcli.methods.context import AttachContext

# What transformers' configurations call the switch for biases of linear layers.
_SWITCHES = ("attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "use_bias", "enable_bias", "add_qkv_bias", "bias")


class Bitfit(Subset):
    """Only biases move, those of norms among them: a thousandth of the weights and less.

    Forward and backward cost what full training costs, without optimizer state worth speaking of. For models with biases (GPT-2,
    OPT, Phi, Qwen2's queries, keys and values) and small data. Most newer models have none: `add_biases` gives linear layers
    biases of zero where the architecture has a configuration switch for them, so that the result still loads everywhere.

    The default learning rate is the lower of two that were tried on the embedded model with `add_biases` (40 steps of 16 orders; loss
    of orders and of retained stories, 6.87 and 0.494 before): 1e-2 gave 1.02 and 1.60, 4e-2 gave 0.43 and 2.75. Biases forget much
    where the task is far from the base.

    On small bases it does not beat the untuned base in answers everywhere (docs/methods.md, three seeds): no order is exact after 100
    steps, as before (loss 6.9 to 0.3), and no label of babyllama-361 right; the embedded model goes from 0 to 9 % of 20 labels.

    Source: Zaken et al. 2021, arXiv:2106.10199.
    """

    kind: Literal["bitfit"] = "bitfit"
    add_biases: bool = False
    """Give the linear layers biases of zero where the architecture's configuration has a switch for them, and train these, too."""

    default_lr: ClassVar[float] = 1e-2
    lr_scales_with_width: ClassVar[bool] = False

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """The model itself, with zero biases where they are asked for, and all biases trainable."""
        if self.add_biases:
            add_biases(model)
        return super().attach(model, context)

    def trained_names(self, model: PreTrainedModel) -> Collection[str]:
        """All biases."""
        from ftcli.methods.parts import bias_parameters

        if names := bias_parameters(model):
            return names
        switches = bias_switches(model.config)
        hint = "method.add_biases: true gives it some, zero at the start" if switches else "method.kind: norms, freeze or lora"
        problem = Problem("method.kind", f"`{model.config.model_type}` has no biases", hint)
        raise RequestError("the method does not fit the model", [problem])


def add_biases(model: PreTrainedModel) -> None:
    """Give `model` every bias that its configuration has a switch for, zero at the start, and turn the switches on.

    Raises:
        RequestError: there is no such switch that is off.
    """
    import torch

    config = model.config
    switches = bias_switches(config)
    if not switches:
        what = (
            f"`{config.model_type}` has no switch for biases that is off, and a result with others would load nowhere "
            f"(looked for {', '.join(_SWITCHES)})"
        )
        raise RequestError(
            "the method does not fit the model", [Problem("method.add_biases", what, "leave it out, or method.kind: norms or lora")]
        )
    shapes = _parameter_shapes(_switched_on(config, switches))
    # Compared with the language model of the same configuration: `model` may have another head.
    for name in shapes.keys() - _parameter_shapes(config).keys():
        owner = model.get_submodule(name.rpartition(".")[0])
        like = next(owner.parameters())
        owner.bias = torch.nn.Parameter(torch.zeros(shapes[name], dtype=like.dtype, device=like.device))
    for switch in switches:
        setattr(config, switch, True)


def bias_switches(config: PretrainedConfig) -> list[str]:
    """The switches of a configuration that are off and, turned on, add biases to the model and change nothing else.

    Found by building the model both ways without weights, so that a field of the right name that nothing reads is not taken for one.
    """
    candidates = [name for name in _SWITCHES if getattr(config, name, None) is False]
    if not candidates:
        return []
    plain = _parameter_shapes(config)
    return [name for name in candidates if _adds_biases(plain, _parameter_shapes(_switched_on(config, [name])))]


def _adds_biases(plain: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> bool:
    new = found.keys() - plain.keys()
    return bool(new) and all(name.endswith(".bias") for name in new) and all(found.get(name) == shape for name, shape in plain.items())


def _switched_on(config: PretrainedConfig, switches: Collection[str]) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    for name in switches:
        setattr(changed, name, True)
    return changed


def _parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by name, of the model that `config` describes."""
    import torch
    from transformers import AutoModelForCausalLM

    from ftcli.models.quiet import quiet_libraries

    with quiet_libraries(), torch.device("meta"):
        # Eager attention is there for every architecture; the forest's is not a choice of a configuration.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
