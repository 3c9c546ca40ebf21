"""The task-balanced mixture: shares by a power of the size."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from ftcli.data.mixtures.balanced import Balanced
from ftcli.data.order import Order

SIZES = [10, 40, 160]


def counts(mixture: Balanced, weights: list[float], first: int = 1, steps: int = 30) -> list[int]:
    order = Order(SIZES, [5.0, 5.0, 5.0], weights, mixture, global_batch_size=7, steps=100, seed=3)
    drawn = Counter(source for step in range(first, first + steps) for source, _ in order.examples_at(step))
    return [drawn[source] for source in range(len(SIZES))]


@pytest.mark.parametrize(
    ("temperature", "weights", "expected"),
    [
        (0.0, [1.0, 1.0, 1.0], [70, 70, 70]),
        (1.0, [1.0, 1.0, 1.0], [10, 40, 160]),
        (0.5, [1.0, 1.0, 1.0], [30, 60, 120]),  # 1 : 2 : 4
        (0.0, [2.0, 0.5, 0.5], [140, 35, 35]),
    ],
)
@pytest.mark.parametrize("first", [1, 40])
def test_shares_grow_with_a_power_of_the_size(temperature: float, weights: list[float], expected: list[int], first: int) -> None:
    found = counts(Balanced(temperature=temperature), weights, first)
    assert all(abs(a - b) <= 2 for a, b in zip(found, expected, strict=True))


def test_an_epoch_is_as_many_examples_as_there_are_and_each_source_is_seen_whole_before_again() -> None:
    order = Order(SIZES, [5.0, 5.0, 5.0], [1.0, 1.0, 1.0], Balanced(), global_batch_size=7, epochs=1, seed=3)
    assert order.examples_per_epoch == 210
    assert order.num_steps == 30
    assert order.repeats() == pytest.approx([7.0, 1.75, 0.4375], rel=1e-3)
    drawn = [tree for step in range(1, 31) for source, tree in order.examples_at(step) if source == 0]
    assert all(sorted(drawn[start : start + 10]) == list(range(10)) for start in range(0, 60, 10))


def test_a_step_is_a_function_of_the_seed_alone() -> None:
    first, again, other = (Order(SIZES, [5.0] * 3, [1.0] * 3, Balanced(), global_batch_size=7, steps=9, seed=seed) for seed in (3, 3, 4))
    assert first.examples_at(5) == again.examples_at(5) != other.examples_at(5)


@pytest.mark.parametrize("temperature", [-0.1, 1.1])
def test_a_temperature_outside_of_its_range_is_refused(temperature: float) -> None:
    with pytest.raises(ValidationError, match="temperature"):
        Balanced(temperature=temperature)
