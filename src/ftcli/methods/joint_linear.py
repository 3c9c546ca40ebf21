"""A frozen linear layer and its low-rank factors as one operation: y = x W' + s (x A') B', the same numbers in fewer passes.

PEFT adds the two products as separate tensors, and autograd adds their gradients as separate tensors: passes over memory that cost
as much as small products do. Here the second product is accumulated into the first, forward and backward. Wherever a layer is more
than this (dropout, DoRA, merged or switched off, other dtypes, hooks on the base), PEFT's own forward pass runs.
Legend: ``N`` tokens, ``I`` and ``O`` inputs and outputs of the layer, ``R`` rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"


def join_products(module: nn.Module) -> None:
    """Let every plain LoRA layer in `module` on an ordinary linear layer compute both its products in one operation."""
    from peft.tuners.lora.layer import Linear

    for layer in module.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
            layer.__class__ = _joint_class(Linear)


@cache
def _joint_class(plain: Any) -> Any:
    def forward(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if arguments or options or not _is_plain(self, x):
            result: Tensor = plain.forward(self, x, *arguments, **options)
            return result
        base, factor_a, factor_b = self.base_layer, self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        joined: Tensor = _JointProduct.apply(x, base.weight, base.bias, factor_a, factor_b, self.scaling[ADAPTER])  # type: ignore[no-untyped-call]
        return joined

    return type("JointLinear", (plain,), {"forward": forward})


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Is this call nothing but the two products, all in one dtype?"""
    base = layer.base_layer
    if layer.disable_adapters or layer.merged or layer.active_adapters != [ADAPTER] or layer.lora_variant:
        return False
    if not isinstance(layer.lora_dropout[ADAPTER], nn.Identity) or layer.lora_B[ADAPTER].bias is not None:
        return False
    if base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook") or base.weight.requires_grad:
        return False
    return torch.is_autocast_enabled(x.device.type) or x.dtype == base.weight.dtype == layer.lora_A[ADAPTER].weight.dtype


class _JointProduct(torch.autograd.Function):
    """The sum of a frozen and a low-rank product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor_a: Tensor, factor_b: Tensor, scaling: float) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            inputs, frozen, a, b = (t.to(dtype) for t in (x.flatten(0, -2), weight, factor_a, factor_b))
            reduced = inputs @ a.t()
            output = nn.functional.linear(inputs, frozen, None if bias is None else bias.to(dtype))
            output.addmm_(reduced, b.t(), alpha=scaling)
        ctx.save_for_backward(inputs, reduced, weight, factor_a, factor_b)
        ctx.scaling, ctx.input_dtype = scaling, x.dtype
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        inputs, reduced, weight, factor_a, factor_b = ctx.saved_tensors
        shape, gradient = upstream[0].shape, upstream[0].flatten(0, -2).to(inputs.dtype)
        needs_input, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        reduced_gradient = (gradient @ factor_b.to(inputs.dtype)).mul_(ctx.scaling)
        a_gradient = (reduced_gradient.t() @ inputs).to(factor_a.dtype) if needs_a else None
        b_gradient = (gradient.t() @ reduced).mul_(ctx.scaling).to(factor_b.dtype) if needs_b else None
        input_gradient = None
        if needs_input:
            total = (gradient @ weight.to(inputs.dtype)).addmm_(reduced_gradient, factor_a.to(inputs.dtype))
            input_gradient = total.view(*shape[:-1], -1).to(ctx.input_dtype)
        return input_gradient, None, None, a_gradient, b_gradient, None
