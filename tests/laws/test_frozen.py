"""Law 5: only declared parameters change; a frozen weight is bit-identical after training."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from ftcli.training.assemble import load_base, make_accelerator
from tests.laws.registered import Bench, Steps, choices, described, language_methods, make_bench

METHODS = [settings for member in language_methods() for settings in choices(member)]
# Whole modules beside an adapter that is on a few layers only.
WITH_MODULES = [
    member(extra_trained_modules=("embed_tokens", "norm"), target_modules=("q_proj",))
    for member in language_methods()
    if "extra_trained_modules" in member.model_fields
]
# What an adapter may declare: its own factors and magnitudes (and AdaLoRA's constant beside them), or a soft prompt's encoder.
ADAPTER_PARAMETER = re.compile(r"(^prompt_encoder|\.(lora_(A|B|E|magnitude_vector)|ranknum|ia3_l|miss_block|bottleneck_adapters))\.")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("frozen"), lr=1e-2)


@pytest.fixture(scope="module")
def trained(bench: Bench) -> dict[str, Steps]:
    return {}


def steps_for(method: Any) -> int:
    """So many that everything has had its turn: an expert beside a factor that starts at zero moves in its second step at the earliest."""
    return 12 if method.kind == "adamix" else 3


def steps_of(method: Any, bench: Bench, trained: dict[str, Steps]) -> Steps:
    """A few steps of `method`, taken once for all tests."""
    name = described(method)
    if name not in trained:
        trained[name] = bench.run(method, steps_for(method))
    return trained[name]


@pytest.mark.parametrize("method", [*METHODS, *WITH_MODULES], ids=described)
def test_what_is_not_declared_stays_bit_identical_and_what_is_declared_moves(method: Any, bench: Bench, trained: dict[str, Steps]) -> None:
    steps = steps_of(method, bench, trained)
    declared = declared_in(steps.module, method, bench, steps_for(method))
    after = dict([*steps.module.named_parameters(), *steps.module.named_buffers()])
    changed = {name for name, tensor in after.items() if not same_bits(tensor, steps.before[name])}
    assert declared
    assert changed == declared


@pytest.mark.parametrize("method", [m for m in METHODS if m.artefact == "adapter"], ids=described)
def test_an_adapter_declares_its_own_parameters_and_leaves_the_base_as_it_is_loaded(
    method: Any, bench: Bench, trained: dict[str, Steps]
) -> None:
    steps = steps_of(method, bench, trained)
    assert all(ADAPTER_PARAMETER.search(name) for name, parameter in steps.module.named_parameters() if parameter.requires_grad)
    found = {
        plain_name(name, steps.module): tensor for name, tensor in steps.module.named_parameters() if not ADAPTER_PARAMETER.search(name)
    }
    recipe = bench.recipe.model_copy(update={"method": method})
    base = load_base(recipe, bench.data.tokenizer, make_accelerator(recipe, None).device)
    expected = dict(base.named_parameters())
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


def declared_in(module: torch.nn.Module, method: Any, bench: Bench, num_steps: int) -> set[str]:
    """The parameters that `method` lets train in the first steps: not all of them where some rest."""
    declared: set[str] = set()
    for step in range(1, num_steps + 1):
        method.before_step(module, step, num_steps, bench.recipe.train.seed)
        declared |= {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return declared


def plain_name(name: str, module: torch.nn.Module) -> str:
    """A base parameter's name without what PEFT puts around it; a soft prompt leaves the base as it is, one wrapper less."""
    return name.removeprefix("base_model." if hasattr(module, "prompt_encoder") else "base_model.model.").replace(".base_layer.", ".")


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit by bit: 0.0 and -0.0 differ, and a NaN is itself."""
    return found.dtype == expected.dtype and torch.equal(
        found.detach().contiguous().view(torch.uint8), expected.detach().contiguous().view(torch.uint8)
    )
