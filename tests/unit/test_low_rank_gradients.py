"""GaLore and APOLLO: what their updates are, and what their state costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ftcli.optim.optimizers.adamw import AdamW
from ftcli.optim.optimizers.apollo import Apollo
from ftcli.optim.optimizers.galore import GaLore
from ftcli.optim.state import optimizer_state

LR = 0.1


def parameters(**shapes: tuple[int, ...]) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {f"layers.0.{name}.weight": torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def built(settings: Any, params: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = settings.build([{"params": list(params.values()), "names": list(params)}], LR)
    return optimizer


def one_step(settings: Any, weight: torch.Tensor, *gradients: torch.Tensor) -> torch.Tensor:
    """What the last of several gradients moved a weight by, over the learning rate."""
    params = {"layers.0.up.weight": torch.nn.Parameter(weight.clone())}
    optimizer = built(settings, params)
    moved = torch.zeros_like(weight)
    for gradient in gradients:
        before = params["layers.0.up.weight"].detach().clone()
        params["layers.0.up.weight"].grad = gradient.clone()
        optimizer.step()
        moved = (before - params["layers.0.up.weight"].detach()) / LR
    return moved


def state_bytes(settings: Any, shape: tuple[int, int]) -> int:
    params = parameters(up=shape)
    optimizer = built(settings, params)
    for param in params.values():
        param.grad = torch.randn_like(param)
    optimizer.step()
    tensors, _ = optimizer_state(optimizer)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize("shape", [(64, 256), (256, 64)])
def test_the_state_is_as_small_as_the_formula_says(shape: tuple[int, int]) -> None:
    m, n, rank = 64, 256, 8
    assert state_bytes(AdamW(), shape) == 4 * (2 * m * n + 1)  # and the step
    assert state_bytes(GaLore(rank=rank), shape) == 4 * (2 * rank * n + rank * m)
    assert state_bytes(Apollo(rank=rank), shape) == 4 * (2 * rank * n + 1)  # and the norm
    assert state_bytes(Apollo(rank=1), shape) == 4 * (2 * n + 1)
    assert state_bytes(GaLore(), shape) == 4 * (2 * 16 * n + 16 * m)  # a quarter of the short side


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_galore_of_a_gradient_within_its_rank_makes_adams_update_in_its_own_coordinates(shape: tuple[int, int]) -> None:
    """A rank-one gradient u v' has one singular vector: the first update is the sign of v, along u."""
    torch.manual_seed(1)
    u, v = torch.randn(shape[0]), torch.randn(shape[1])
    moved = one_step(GaLore(rank=1, scale=1.0), torch.zeros(shape), torch.outer(u, v))
    expected = torch.outer(u / u.norm(), v.sign()) if shape[0] < shape[1] else torch.outer(u.sign(), v / v.norm())
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-3)


def test_galore_takes_the_largest_singular_vectors_and_keeps_them_until_the_refresh() -> None:
    torch.manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(6, 6))
    first = 10 * torch.outer(basis[:, 0], torch.randn(20)) + torch.outer(basis[:, 1], torch.randn(20))
    second = torch.outer(basis[:, 1], torch.randn(20))
    weight = torch.zeros(6, 20)
    kept = one_step(GaLore(rank=1, update_projection_every=2), weight, first, second)
    assert (basis[:, 1] @ kept).norm() < 0.05 * (basis[:, 0] @ kept).norm()
    refreshed = one_step(GaLore(rank=1, update_projection_every=2), weight, first, second, second)
    assert (basis[:, 1] @ refreshed).norm() > 20 * (basis[:, 0] @ refreshed).norm()


def test_galore_at_nearly_full_rank_is_near_to_adam_in_rotated_coordinates() -> None:
    """Rotated by its own singular vectors, the update of a first step is the sign of the rotated gradient."""
    torch.manual_seed(1)
    gradient = torch.randn(5, 12)
    left, _, _ = torch.linalg.svd(gradient)
    moved = one_step(GaLore(rank=4, scale=1.0), torch.zeros(5, 12), gradient)
    rotated = left.T @ moved
    torch.testing.assert_close(rotated[:4], (left.T @ gradient)[:4].sign(), rtol=1e-3, atol=1e-3)
    assert rotated[4].abs().max() < 1e-4


def test_apollo_scales_each_channel_of_the_gradient_and_turns_none() -> None:
    torch.manual_seed(1)
    gradient = torch.randn(8, 30) * torch.logspace(-3, 3, 30)
    moved = one_step(Apollo(rank=4), torch.zeros(8, 30), gradient)
    factors = moved / gradient
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-4, atol=0)
    # Adam's first direction has entries of 1: r of them in the image, against the image's length, which is the gradient's on average
    expected = math.sqrt(4) / gradient.norm(dim=0)
    ratio = factors[0] / expected
    assert 0.6 < ratio.median() < 1.7


def test_apollo_mini_has_one_factor_for_the_whole_matrix() -> None:
    torch.manual_seed(1)
    gradient = torch.randn(8, 30)
    moved = one_step(Apollo(rank=1), torch.zeros(8, 30), gradient)
    factors = moved / gradient
    torch.testing.assert_close(factors, factors[:1, :1].expand_as(factors), rtol=1e-4, atol=0)
    plain = one_step(Apollo(rank=1, scale=1.0), torch.zeros(8, 30), gradient)
    torch.testing.assert_close(moved, plain * 128**0.5)


def test_an_apollo_update_grows_by_at_most_a_hundredth_a_step() -> None:
    torch.manual_seed(1)
    gradient, weight = torch.randn(8, 30), torch.zeros(8, 30)
    # Without memory of the mean, Adam's second direction is 1.41 times as long: 1000 / sqrt((0.001 * 1e6 + 0.001) / 0.002).
    settings = Apollo(rank=2, betas=(0.0, 0.999))
    small = one_step(settings, weight, gradient).norm()
    large = one_step(settings, weight, gradient, 1000 * gradient).norm()
    torch.testing.assert_close(large, 1.01 * small, rtol=1e-4, atol=0)
    after_nothing = one_step(settings, weight, 0 * gradient, gradient).norm()
    assert after_nothing > 1.2 * small


def test_apollo_draws_another_projection_at_every_refresh_and_for_every_matrix() -> None:
    torch.manual_seed(1)
    gradient, weight = torch.randn(8, 30), torch.zeros(8, 30)
    gradients = [gradient] * 3
    kept = one_step(Apollo(rank=2, update_projection_every=5), weight, *gradients)
    assert not torch.equal(kept, one_step(Apollo(rank=2, update_projection_every=1), weight, *gradients))
    assert torch.equal(kept, one_step(Apollo(rank=2, update_projection_every=5), weight, *gradients))
    params = parameters(up=(8, 30), down=(8, 30))
    optimizer = built(Apollo(rank=2), params)
    before = {name: param.detach().clone() for name, param in params.items()}
    for param in params.values():
        param.grad = gradient.clone()
    optimizer.step()
    up, down = (before[name] - params[name].detach() for name in params)
    assert not torch.allclose(up, down, rtol=1e-3)


@pytest.mark.parametrize("settings", [GaLore(rank=4), Apollo(rank=4)], ids=lambda settings: settings.kind)
def test_only_hidden_matrices_longer_than_the_rank_are_projected(settings: Any) -> None:
    params = {
        "embed_tokens.weight": torch.nn.Parameter(torch.ones(30, 8)),
        "layers.0.up.weight": torch.nn.Parameter(torch.ones(8, 30)),
        "layers.0.narrow.weight": torch.nn.Parameter(torch.ones(4, 30)),
        "layers.0.experts": torch.nn.Parameter(torch.ones(2, 8, 30)),
        "layers.0.norm.weight": torch.nn.Parameter(torch.ones(8)),
    }
    plain = {name: torch.nn.Parameter(param.detach().clone()) for name, param in params.items()}
    optimizer, adamw = built(settings, params), built(AdamW(), plain)
    torch.manual_seed(1)
    for name, param in params.items():
        param.grad = torch.randn_like(param)
        plain[name].grad = param.grad.clone()
    optimizer.step()
    adamw.step()
    different = {name for name, param in params.items() if not torch.allclose(param, plain[name])}
    assert different == {"layers.0.up.weight"}
