"""PEFT's layers of every type but LoRA folded into plain weights, each layer compared before it counts as merged.

PEFT has a formula for each type, or none. Here it runs in float32, and what comes out has to compute what the layer computed: a type
that changes its input, or depends on it, cannot slip through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftcli.errors import Problem, RequestError
from ftcli.models.quantisation import is_quantised
from ftcli.models.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4
_NUM_INPUTS = 32


def tuner_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer with an adapter of whatever type, by its name in `module`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer))


def merge_layers(model: PreTrainedModel) -> None:
    """Fold every adapted layer of `model` into its plain layer, in float32 and rounded once.

    Raises:
        RequestError: a layer has no plain weights that compute the same, and why.
    """
    from transformers.pytorch_utils import Conv1D

    with torch.no_grad(), quiet_libraries():
        for name, layer in list(tuner_layers(model)):
            base = layer.get_base_layer()
            if is_quantised(base) or not isinstance(base, nn.Linear | Conv1D):
                raise _refused(name, f"the layer below is a {type(base).__name__}, and only plain linear layers take weights")
            dtype = base.weight.dtype
            layer.float().eval()
            inputs = _inputs(base)
            expected = layer(inputs)
            try:
                layer.merge(safe_merge=True)
            except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
                raise _refused(name, str(error).splitlines()[0]) from error
            merged = layer.get_base_layer()
            found = merged(inputs)
            difference, size = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
            if difference > TOLERANCE * size:
                raise _refused(name, f"merged and attached differ by {difference:.1e} on outputs of up to {size:.1e}")
            model.set_submodule(name, merged.to(dtype))


def _inputs(base: Any) -> Tensor:
    """(_NUM_INPUTS, in) of the usual size, the same each time."""
    from torch.nn import Linear

    num_in = base.in_features if isinstance(base, Linear) else base.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_NUM_INPUTS, num_in, generator=generator).to(base.weight.device)


def _refused(name: str, reason: str) -> RequestError:
    hint = "the adapter works beside the base: `ftcli generate RUN`, or PEFT"
    return RequestError("this adapter cannot be merged", [Problem(name, reason, hint)])
