"""Optimizers: what they do to weights, and that a kept state goes on exactly where it stopped."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load, save

from ftcli.errors import RunError
from ftcli.optim.optimizers import Optimizer
from ftcli.optim.optimizers.adafactor import Adafactor
from ftcli.optim.optimizers.adamw import AdamW
from ftcli.optim.optimizers.lion import Lion
from ftcli.optim.optimizers.muon import Muon
from ftcli.optim.optimizers.sgd import SGD
from ftcli.optim.state import optimizer_state, restore_optimizer_state

KINDS = get_args(get_args(Optimizer)[0])
SPECS = [kind() for kind in KINDS]


def _params(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    """An embedding, two hidden matrices large enough for 8-bit state, a vector, and one that never gets a gradient."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "embed_tokens.weight": (8, 4),
        "layers.0.up.weight": (128, 64),
        "layers.0.down.weight": (64, 128),
        "layers.0.norm.weight": (64,),
        "layers.1.up.weight": (4, 4),
    }
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def _groups(params: dict[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    matrices = {name: param for name, param in params.items() if param.ndim > 1}
    vectors = {name: param for name, param in params.items() if param.ndim == 1}
    return [
        {"params": list(matrices.values()), "names": list(matrices)},
        {"params": list(vectors.values()), "names": list(vectors), "weight_decay": 0.0, "lr": 0.5},
    ]


def _give_gradients(params: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for name, param in params.items():
        if name != "layers.1.up.weight":
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_every_group_knows_its_peak_lr(spec: Any) -> None:
    optimizer = spec.build(_groups(_params()), 0.1)
    peaks = {name: group["peak_lr"] for group in optimizer.param_groups for name in group["names"]}
    assert peaks == {
        "embed_tokens.weight": 0.1,
        "layers.0.up.weight": 0.1,
        "layers.0.down.weight": 0.1,
        "layers.1.up.weight": 0.1,
        "layers.0.norm.weight": 0.5,
    }
    assert all(group["lr"] == group["peak_lr"] for group in optimizer.param_groups)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_learning_rate_of_zero_moves_nothing(spec: Any) -> None:
    params = _params()
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer = spec.model_copy(update={"weight_decay": 0.5}).build(_groups(params), 0.1)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * 0.0
    _give_gradients(params, 1)
    optimizer.step()
    assert all(torch.equal(before[name], param) for name, param in params.items())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_only_parameters_with_a_gradient_move_and_vectors_never_decay(spec: Any) -> None:
    moved = {}
    for weight_decay in (0.0, 0.5):
        params = _params()
        optimizer = spec.model_copy(update={"weight_decay": weight_decay}).build(_groups(params), 0.1)
        _give_gradients(params, 1)
        optimizer.step()
        moved[weight_decay] = params
    start = _params()
    assert torch.equal(moved[0.5]["layers.1.up.weight"], start["layers.1.up.weight"])
    assert not torch.equal(moved[0.0]["layers.0.norm.weight"], start["layers.0.norm.weight"])
    assert torch.equal(moved[0.5]["layers.0.norm.weight"], moved[0.0]["layers.0.norm.weight"])
    for name in ("embed_tokens.weight", "layers.0.up.weight"):
        assert not torch.equal(moved[0.5][name], moved[0.0][name])
        decayed = moved[0.0][name] - 0.1 * 0.5 * start[name]
        torch.testing.assert_close(moved[0.5][name], decayed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [*SPECS, SGD(momentum=0.9, nesterov=True)], ids=lambda spec: spec.kind)
def test_a_restored_state_gives_the_same_updates(spec: Any, dtype: torch.dtype) -> None:
    params = _params(dtype)
    optimizer = spec.build(_groups(params), 0.01)
    for step in (1, 2):
        _give_gradients(params, step)
        optimizer.step()

    tensors, scalars = optimizer_state(optimizer)
    kept_tensors = load(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    kept_scalars = json.loads(json.dumps(scalars))
    resumed_params = {name: torch.nn.Parameter(param.detach().clone()) for name, param in params.items()}
    resumed = spec.build(_groups(resumed_params), 0.01)
    restore_optimizer_state(resumed, kept_tensors, kept_scalars)

    for step in (3, 4):
        for some_params, some_optimizer in ((params, optimizer), (resumed_params, resumed)):
            _give_gradients(some_params, step)
            some_optimizer.step()
    assert all(torch.equal(param, resumed_params[name]) for name, param in params.items())


def test_a_state_with_unknown_parameters_is_refused() -> None:
    optimizer = AdamW().build(_groups(_params()), 0.01)
    with pytest.raises(RunError, match=r"holds 1 parameters.*\n\n  gone\.weight: is not a parameter"):
        restore_optimizer_state(optimizer, {"gone.weight/exp_avg": torch.zeros(2)}, {})


def test_a_state_before_the_first_step_is_empty() -> None:
    tensors, scalars = optimizer_state(AdamW().build(_groups(_params()), 0.01))
    assert tensors == {}
    assert scalars == {}


def test_adamw_is_fused_on_cpu() -> None:
    assert AdamW().build(_groups(_params()), 0.1).param_groups[0]["fused"] is True


def test_lion_moves_each_weight_by_the_learning_rate_in_the_sign_of_the_mixed_momentum() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = Lion(betas=(0.5, 0.75)).build([{"params": [weight], "names": ["weight"]}], 0.25)
    weight.grad = torch.tensor([4.0, -4.0, 0.0])
    optimizer.step()
    assert weight.tolist() == [0.75, 1.25, 1.0]
    # the momentum is (1 - 0.75) * 4 = 1; mixed with the second gradient: 0.5 * 1 + 0.5 * -0.5 > 0, 0.5 * -1 + 0.5 * 3 > 0
    weight.grad = torch.tensor([-0.5, 3.0, -1.0])
    optimizer.step()
    assert weight.tolist() == [0.5, 1.0, 1.25]


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    params = _params()
    params["lm_head.weight"] = torch.nn.Parameter(torch.randn(8, 4))
    params["experts.gate_up_proj"] = torch.nn.Parameter(torch.randn(2, 4, 4))
    optimizer = Muon().build(_groups(params), 0.1)
    rules = {name: group["rule"] for group in optimizer.param_groups for name in group["names"]}
    assert {name for name, rule in rules.items() if rule == "muon"} == {"layers.0.up.weight", "layers.0.down.weight", "layers.1.up.weight"}
    assert set(rules) == set(params)


@pytest.mark.parametrize("names", [["layers.0.up.weight"], ["embed_tokens.weight"]], ids=["hidden only", "no hidden"])
def test_muon_works_where_only_one_of_its_rules_has_work(names: list[str]) -> None:
    params = {name: param for name, param in _params().items() if name in names}
    before = {name: param.detach().clone() for name, param in params.items()}
    optimizer = Muon().build([{"params": list(params.values()), "names": list(params)}], 0.1)
    _give_gradients(params, 1)
    optimizer.step()
    assert all(not torch.equal(before[name], param) for name, param in params.items())


def test_muons_update_is_nearly_orthogonal_and_of_adamws_size() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Muon().build([{"params": [weight], "names": ["weight"]}], 1.0)
    weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    optimizer.step()
    # with orthogonal updates every singular value is 0.2 * sqrt(64) = 1.6; five iterations come near that
    values = torch.linalg.svdvals(weight.detach())
    assert values.max() < 1.6 * 1.3
    assert values.median() > 1.6 * 0.6


def test_adafactor_moves_a_matrix_of_zeros_at_the_learning_rate() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = Adafactor().build([{"params": [weight], "names": ["lora_B.weight"]}], 0.1)
    weight.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
    optimizer.step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.1)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="`nesterov` needs `momentum` above 0"):
        SGD(nesterov=True)
