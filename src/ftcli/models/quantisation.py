"""How linear weights are stored in 4 or 8 bits, and what they are when read back.

A quantised weight is frozen. What the model computes with is its *dequantised* value, so that is the base an adapter was trained
on, and the base it has to be merged into. Source of the formats: Dettmers et al. 2023, arXiv:2305.14314 (nf4, double quantisation).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from ftcli.errors import Problem, RequestError
from ftcli.models.dtypes import DtypeName
from ftcli.spec import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


class Quantization(Spec):
    """How the linear weights of a frozen base are stored."""

    format: Literal["nf4", "fp4", "int8"] = "nf4"
    """`nf4` and `fp4` are 4 bits a weight, in blocks of 64 with a common scale; `int8` is 8 bits with a scale per output."""
    double_quant: bool = True
    """Quantise the scales of the 4-bit formats, too: 0.37 bits a weight less."""
    compute_dtype: DtypeName = "auto"
    """Of the matrix products; `auto` is float32 on CPU, bfloat16 on hardware made for it, else float16."""


def check_support(quantization: Quantization, device: str) -> None:
    """Raise a RequestError where `quantization` cannot be had."""
    if device.startswith("mps"):
        what = f"`{quantization.format}` is not supported on {device} (devices: cpu, cuda)"
        raise RequestError("the base cannot be quantised", [Problem("method.quantize.format", what)])


def loading_arguments(quantization: Quantization, device: str) -> dict[str, Any]:
    """What transformers' `from_pretrained` has to be told."""
    from transformers import BitsAndBytesConfig

    if quantization.format == "int8":
        # A threshold of 0 keeps no outlier columns apart: the product is that of the stored weight, and so mergeable.
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.format,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=compute_dtype(quantization, device),
        )
    }


def compute_dtype(quantization: Quantization, device: str) -> torch.dtype:
    """Dtype of the matrix products with dequantised weights."""
    import torch

    if quantization.compute_dtype != "auto":
        chosen = getattr(torch, quantization.compute_dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def settle(model: PreTrainedModel, quantization: Quantization, device: str) -> None:
    """Put every quantised layer on the path whose product is exactly that of the dequantised weight, in training and evaluation.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight at the first evaluation and from then on multiplies in
    bfloat16, without a gradient: training after an evaluation would silently stop to reach the layers below. Its 8-bit layers
    round the activations, too, in evaluation and on CUDA: no plain weight can equal that. Its 4-bit path on CUDA is kept.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    dequantize_4bit()
    dtype = compute_dtype(quantization, device)
    for module in model.modules():
        if isinstance(module, Linear8bitLt) or (isinstance(module, Linear4bit) and not device.startswith("cuda")):
            layer: Any = module
            layer.__class__ = _exact_linear(layer.__class__)
            layer.compute_dtype = dtype


def is_quantised(module: Any) -> bool:
    """Is the weight of this layer stored in 4 or 8 bits?"""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def dequantised_weight(module: Any) -> Tensor:
    """(out, in) what a quantised layer computes with; 4-bit formats in the dtype they were made from, int8 in float32."""
    import torch

    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        return dequantize_4bit()(weight.data, weight.quant_state)
    return _dequantise_8bit(*_stored_8bit(module), torch.float32)


def requantised_weight(module: Any, weight: Tensor) -> Tensor:
    """(out, in) what `weight` becomes when it is stored as the weight of the quantised layer `module` is."""
    import torch

    stored = module.weight
    if type(stored).__name__ == "Params4bit":
        from bitsandbytes.functional import quantize_4bit

        data, state = quantize_4bit(
            weight.contiguous(), blocksize=stored.blocksize, compress_statistics=stored.compress_statistics, quant_type=stored.quant_type
        )
        return dequantize_4bit()(data, state)
    from bitsandbytes.functional import int8_vectorwise_quant

    levels, scale, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    return _dequantise_8bit(levels, scale, torch.float32)


@cache
def dequantize_4bit() -> Callable[..., Tensor]:
    """bitsandbytes' function of this name, put right in its own place, so that PEFT reads what the model computes with.

    With rows that are no multiple of a block (64), bitsandbytes 0.50 gives values other scales than their own on a CPU: an error of 0.2 to
    0.4 of the weight instead of 0.09. Taken as one long row the same bytes are read rightly. Where that makes no difference nothing is
    replaced.
    """
    import torch
    from bitsandbytes import functional

    given: Callable[..., Tensor] = functional.dequantize_4bit

    def as_one_row(data: Tensor, state: Any) -> Tensor:
        row = copy(state)
        row.shape = (state.shape.numel(),)
        return given(data.reshape(-1, 1), row).reshape(state.shape)

    stored, known = functional.quantize_4bit(torch.linspace(-1, 1, 192).reshape(2, 96), quant_type="nf4")
    if torch.equal(given(stored, known), as_one_row(stored, known)):
        return given

    def repaired(A: Tensor, quant_state: Any = None, *others: Any, **named: Any) -> Tensor:
        has_whole_blocks = quant_state is None or len(quant_state.shape) < 2 or quant_state.shape[-1] % quant_state.blocksize == 0
        if has_whole_blocks or A.device.type != "cpu" or others or named.get("out") is not None:
            return given(A, quant_state, *others, **named)
        values = as_one_row(A, quant_state)
        return values.t() if A.shape[0] == 1 else values

    functional.dequantize_4bit = repaired
    return repaired


def _stored_8bit(module: Any) -> tuple[Tensor, Tensor]:
    """(out, in) int8 levels and (out,) largest magnitudes: in the weight until the first forward pass, then in the layer's state."""
    weight, state = module.weight, module.state
    scale = weight.SCB if weight.SCB is not None else state.SCB
    return weight.data, scale.to(weight.device)


def _dequantise_8bit(levels: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return levels.to(dtype) * (scale.to(dtype) / 127).unsqueeze(1)


@cache
def _exact_linear(layer: Any) -> Any:
    """The quantised layer class with the product of its dequantised weight, which is not kept for the backward pass."""
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: Tensor, module: Any) -> Tensor:
            ctx.module = module
            return torch.nn.functional.linear(inputs, dequantised_weight(module).to(inputs.dtype))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
            return gradients[0] @ dequantised_weight(ctx.module).to(gradients[0].dtype), None

    def forward(self: Any, x: Tensor) -> Tensor:
        product: Tensor = Product.apply(x.to(self.compute_dtype), self)  # type: ignore[no-untyped-call]
        return product.to(x.dtype) if self.bias is None else (product + self.bias.to(product.dtype)).to(x.dtype)

    return type(f"Exact{layer.__name__}", (layer,), {"forward": forward})
