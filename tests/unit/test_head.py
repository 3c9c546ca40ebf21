"""The output head in parts equals a plain log-softmax over the whole vocabulary, with its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftcli.models import head
from ftcli.models.head import HeadTransform, target_log_probs

VOCABULARY, SIZE, NUM_TARGETS = 1000, 24, 50
TRANSFORMS = {"plain": HeadTransform(), "scaled": HeadTransform(0.3), "soft-capped": HeadTransform(1.7, 2.0)}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tiles of the vocabulary, the last one narrower; four chunks of targets, the last one smaller."""
    monkeypatch.setattr(head, "CHUNK_LOGITS_CPU", 16 * VOCABULARY)


def inputs(dtype: torch.dtype, trains: bool) -> tuple[Tensor, Tensor, nn.Linear, Tensor]:
    """Hidden states, targets, head, and the gradient of the log-probabilities. Some targets are all but certain."""
    generator = torch.Generator().manual_seed(5)
    linear = nn.Linear(SIZE, VOCABULARY).requires_grad_(trains)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    targets = torch.randint(0, VOCABULARY, (NUM_TARGETS,), generator=generator)
    targets[:4] = torch.tensor([0, 255, 256, VOCABULARY - 1])
    hidden = torch.randn(NUM_TARGETS, SIZE, generator=generator)
    hidden[:5] += 2 * linear.weight.data[targets[:5]]
    upstream = torch.randn(NUM_TARGETS, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return hidden.to(dtype).requires_grad_(), targets, linear.to(dtype), upstream


def reference(hidden: Tensor, targets: Tensor, linear: nn.Linear, transform: HeadTransform) -> Tensor:
    return transform(linear(hidden)).log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)


def gradients(log_probs: Tensor, upstream: Tensor, hidden: Tensor, linear: nn.Linear) -> list[Tensor]:
    trained = [hidden, *(p for p in linear.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(log_probs, trained, upstream))


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_parts_equal_the_whole(transform: HeadTransform, trains: bool) -> None:
    hidden, targets, linear, upstream = inputs(torch.float64, trains)
    found, expected = target_log_probs(hidden, targets, linear, transform), reference(hidden, targets, linear, transform)
    assert float((found - expected).detach().abs().max()) < 1e-12
    pairs = zip(gradients(found, upstream, hidden, linear), gradients(expected, upstream, hidden, linear), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-12


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_a_likely_target_keeps_its_small_gradient_in_bfloat16(trains: bool) -> None:
    hidden, targets, linear, upstream = inputs(torch.bfloat16, trains)
    # The rounding of the logits themselves is nobody's fault: the reference shares it, and is exact from there on.
    raw = (linear(hidden).float().softmax(dim=1) - nn.functional.one_hot(targets, VOCABULARY)).double().detach()
    expected = -(raw * upstream[:, None]) @ linear.weight.detach().double()
    found = gradients(target_log_probs(hidden, targets, linear, HeadTransform()), upstream, hidden, linear)[0].double()
    relative = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(relative.max()) < 0.02


def test_without_gradients_only_the_log_probabilities_are_computed() -> None:
    hidden, targets, linear, _ = inputs(torch.float64, False)
    with torch.no_grad():
        found = target_log_probs(hidden, targets, linear, HeadTransform())
    assert not found.requires_grad
    expected = reference(hidden, targets, linear, HeadTransform()).detach()
    assert float((found - expected).abs().max()) < 1e-12
