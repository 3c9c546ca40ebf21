"""A layer with its factors as one operation gives what PEFT's two products give."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ftcli.methods.joint_linear import _JointProduct, join_products


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(joined: bool, dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], **options)  # type: ignore[arg-type]
    module = get_peft_model(TwoLayers(), config)  # type: ignore[arg-type]  # PEFT takes any module
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
    if joined:
        join_products(module)
    return module


def outputs_and_gradients(module: nn.Module, dtype: torch.dtype = torch.float64, bf16: bool = False) -> list[Tensor]:
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    torch.manual_seed(9)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = module(x)
    trained = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [output.detach(), *torch.autograd.grad(output.float().square().sum() if bf16 else output.square().sum(), trained)]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest, relative to the largest entry of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every joint operation."""
    counted: list[int] = []
    apply = _JointProduct.apply
    monkeypatch.setattr(_JointProduct, "apply", lambda *arguments: (counted.append(1), apply(*arguments))[1])
    return counted


def test_joined_equals_apart(calls: list[int]) -> None:
    assert difference(outputs_and_gradients(adapted(True)), outputs_and_gradients(adapted(False))) < 1e-13
    assert len(calls) == 2


def test_joined_equals_apart_under_autocast(calls: list[int]) -> None:
    found = outputs_and_gradients(adapted(True, torch.float32), torch.float32, bf16=True)
    assert difference(found, outputs_and_gradients(adapted(False, torch.float32), torch.float32, bf16=True)) < 0.05
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] + [torch.float32] * 5
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}], ids=["dropout", "dora"])
def test_more_than_two_products_is_left_to_peft(options: dict[str, object], calls: list[int]) -> None:
    assert difference(outputs_and_gradients(adapted(True, **options)), outputs_and_gradients(adapted(False, **options))) == 0.0
    assert not calls


def test_merging_and_switching_off_still_work() -> None:
    module, x = adapted(True), torch.randn(3, 12, dtype=torch.float64)
    with module.disable_adapter():
        base = module(x)
    attached = module(x)
    merged = module.merge_and_unload()
    assert torch.allclose(merged(x), attached)
    assert not torch.allclose(base, attached)
