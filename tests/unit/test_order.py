"""Which examples a step sees: each as often as the mixture says, in an order that only the seed decides."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ftcli.data.mixtures.passes import Passes
from ftcli.data.mixtures.shares import Shares
from ftcli.data.order import Order
from ftcli.data.permutation import permute


def make_order(
    sizes: list[int], weights: list[float] | None = None, mixture: Any = None, mean_tokens: list[float] | None = None, **given: Any
) -> Order:
    given = {"global_batch_size": 4, "seed": 17} | given
    return Order(sizes, mean_tokens or [1.0] * len(sizes), weights or [1.0] * len(sizes), mixture or Passes(), **given)


def stream(order: Order) -> list[tuple[int, int]]:
    return [example for step in range(1, order.num_steps + 1) for example in order.examples_at(step)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 1 << 12])
def test_a_permutation_has_each_number_once(size: int) -> None:
    assert sorted(permute(np.arange(size, dtype=np.uint64), size, (1, "x"))) == list(range(size))


def test_all_orders_of_few_things_come_about_equally_often() -> None:
    counts = Counter(tuple(permute(np.arange(3, dtype=np.uint64), 3, (seed,)).tolist()) for seed in range(1200))
    assert len(counts) == 6
    assert all(140 <= count <= 260 for count in counts.values())  # 200 expected, four standard deviations


def test_every_place_of_a_permutation_is_equally_likely() -> None:
    places = np.array([permute(np.arange(50, dtype=np.uint64), 50, (seed,))[7] for seed in range(5000)])
    chi_square = ((np.bincount(places, minlength=50) - 100.0) ** 2 / 100.0).sum()
    assert chi_square < 90  # 49 degrees of freedom: 99.97 %


def test_neighbours_do_not_stay_neighbours() -> None:
    order = permute(np.arange(10_000, dtype=np.uint64), 10_000, (5,))
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05


@pytest.mark.parametrize(("sizes", "batch"), [([10], 4), ([1], 1), ([1], 8), ([7, 5], 3), ([3, 1, 9], 100), ([12], 12)])
def test_passes_with_weight_one_see_every_example_once_per_epoch(sizes: list[int], batch: int) -> None:
    seen = stream(make_order(sizes, epochs=3, global_batch_size=batch))
    every = [(source, tree) for source, size in enumerate(sizes) for tree in range(size)]
    for epoch in range(3):
        assert sorted(seen[epoch * len(every) : (epoch + 1) * len(every)]) == every
    assert len(seen) == 3 * len(every)


def test_epochs_differ_and_sources_are_interleaved() -> None:
    seen = stream(make_order([200, 200], epochs=2))
    assert seen[:400] != seen[400:]
    assert 150 < sum(a[0] != b[0] for a, b in pairwise(seen)) < 650


def test_the_seed_alone_decides_the_order() -> None:
    order = make_order([100], epochs=2)
    assert stream(order) == stream(make_order([100], epochs=2))
    assert stream(order) != stream(make_order([100], epochs=2, seed=18))
    assert order.examples_at(31) == make_order([100], epochs=2).examples_at(31)


def test_the_last_step_has_what_is_left() -> None:
    order = make_order([10], epochs=1)
    assert [len(order.examples_at(step)) for step in (1, 2, 3)] == [4, 4, 2]
    assert order.num_steps == 3
    assert order.epoch_at(3) == 1.0
    with pytest.raises(IndexError, match=r"step 4 is not in 1\.\.3"):
        order.examples_at(4)


@pytest.mark.parametrize(("epochs", "num_examples"), [(0.1, 3), (0.5, 15), (1.0, 30), (2.5, 75), (0.01, 1)])
def test_a_fraction_of_an_epoch_has_that_fraction_of_the_examples(epochs: float, num_examples: int) -> None:
    assert len(stream(make_order([30], epochs=epochs))) == num_examples


def test_steps_are_all_full_and_go_on_over_epochs() -> None:
    order = make_order([5], steps=4)
    assert [len(order.examples_at(step)) for step in range(1, 5)] == [4, 4, 4, 4]
    assert order.repeats() == [16 / 5]


def test_a_fractional_weight_rotates_through_the_source() -> None:
    seen = stream(make_order([50, 100], weights=[1.0, 0.1], epochs=10, global_batch_size=60))
    replay = [tree for source, tree in seen if source == 1]
    assert len(replay) == 100
    assert sorted(replay) == list(range(100))
    first_epoch = [tree for source, tree in seen[:60] if source == 1]
    assert len(first_epoch) == 10


def test_a_weight_of_two_and_a_half_repeats_every_example_twice_or_thrice() -> None:
    counts = Counter(tree for _, tree in stream(make_order([40], weights=[2.5], epochs=1)))
    assert sorted(Counter(counts.values()).items()) == [(2, 20), (3, 20)]


def test_repeats_are_the_passes_over_each_source() -> None:
    assert make_order([50, 100], weights=[1.0, 0.1], epochs=3).repeats() == pytest.approx([3.0, 0.3])


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.9, 0.1], [7.0, 2.0, 1.0], [1.0, 0.001]])
def test_shares_hold_in_every_window(weights: list[float]) -> None:
    order = make_order([1000] * len(weights), weights=weights, mixture=Shares(), steps=100, global_batch_size=50)
    sources = np.array([source for source, _ in stream(order)])
    for start in range(0, 4000, 37):
        window = sources[start : start + 1000]
        for source, weight in enumerate(weights):
            expected = len(window) * weight / sum(weights)
            assert abs((window == source).sum() - expected) <= 2


def test_shares_in_tokens_give_short_examples_more_rows() -> None:
    order = make_order([500, 500], weights=[1.0, 1.0], mixture=Shares(unit="tokens"), mean_tokens=[300.0, 100.0], steps=100)
    counts = Counter(source for source, _ in stream(order))
    assert counts[1] == pytest.approx(300, abs=2)
    assert counts[0] == pytest.approx(100, abs=2)


def test_shares_see_a_source_whole_before_any_of_it_again() -> None:
    seen = stream(make_order([1000, 10], weights=[0.5, 0.5], mixture=Shares(), steps=50))
    small = [tree for source, tree in seen if source == 1]
    for start in range(0, 100, 10):
        assert sorted(small[start : start + 10]) == list(range(10))
    assert len({tuple(small[start : start + 10]) for start in range(0, 100, 10)}) == 10


def test_an_epoch_of_shares_is_one_pass_over_the_first_source() -> None:
    order = make_order([90, 1000], weights=[0.9, 0.1], mixture=Shares(), epochs=1)
    assert order.examples_per_epoch == 100
    assert sorted(tree for source, tree in stream(order) if source == 0) == list(range(90))
    assert order.repeats() == pytest.approx([1.0, 0.01], rel=1e-3)


def test_a_share_goes_on_behind_the_end_of_a_block() -> None:
    order = make_order([200_000, 7], weights=[0.999, 0.001], mixture=Shares(), steps=2000, global_batch_size=100)
    small = [tree for source, tree in stream(order) if source == 1]
    assert len(small) == pytest.approx(200, abs=4)
    for start in range(0, 189, 7):
        assert sorted(small[start : start + 7]) == list(range(7))


def test_a_step_far_away_is_there_at_once() -> None:
    order = make_order([10**9, 3], weights=[1.0, 1.0], steps=10**8, global_batch_size=64)
    assert len(order.examples_at(10**8)) == 64
