"""Schedules hit their breakpoints, for lengths of 0 and 1, too."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftcli.optim.schedules import Schedule
from ftcli.optim.schedules.constant import Constant
from ftcli.optim.schedules.cosine import Cosine
from ftcli.optim.schedules.infinite import Infinite
from ftcli.optim.schedules.linear import Linear
from ftcli.optim.schedules.rewarm import Rewarm
from ftcli.optim.schedules.warmup import steps_of
from ftcli.optim.schedules.wsd import WSD

KINDS = get_args(get_args(Schedule)[0])
OF_ONE_PEAK = [kind for kind in KINDS if kind is not Rewarm]


def _factors(schedule: Any, num_steps: int) -> list[float]:
    return [schedule.factor_at(step, num_steps) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize(
    ("schedule", "num_steps", "factors"),
    [
        (Constant(), 3, [1, 1, 1]),
        (Constant(warmup_steps=2), 4, [0.5, 1, 1, 1]),
        (Linear(min_lr_ratio=0.0), 5, [1, 0.75, 0.5, 0.25, 0]),
        (Linear(min_lr_ratio=0.2, warmup_steps=2), 6, [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        (Linear(min_lr_ratio=0.0, warmup_ratio=0.4), 5, [0.5, 1, 2 / 3, 1 / 3, 0]),
        (Cosine(min_lr_ratio=0.0), 3, [1, 0.5, 0]),
        (Cosine(min_lr_ratio=0.5, warmup_steps=4), 6, [0.25, 0.5, 0.75, 1, 0.75, 0.5]),
        (WSD(warmup_steps=2, decay_steps=2, min_lr_ratio=0.0), 6, [0.5, 1, 1, 1, 0.5, 0]),
        (WSD(decay_ratio=0.5, min_lr_ratio=0.0), 4, [1, 1, 0.5, 0]),
        (WSD(decay_steps=4, shape="sqrt", min_lr_ratio=0.0), 5, [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0]),
        (WSD(decay_steps=2, shape="cosine", min_lr_ratio=0.0), 3, [1, 0.5, 0]),
        (WSD(decay_steps=0, min_lr_ratio=0.0), 3, [1, 1, 1]),
        (WSD(decay_steps=1, min_lr_ratio=0.0), 3, [1, 1, 0]),
        (WSD(min_lr_ratio=0.0), 10, [1] * 8 + [0.5, 0]),
        (WSD(warmup_steps=3, decay_steps=9, min_lr_ratio=0.0), 5, [1 / 3, 2 / 3, 1, 0.5, 0]),
        (Infinite(warmup_steps=2, cooldown_steps=2, constant_ratio=0.4, anneal_steps=2), 7, [0.5, 1, 0.7, 0.4, 0.4, 0.2, 0.1]),
        (Infinite(cooldown_steps=0, constant_ratio=0.4, anneal_steps=0), 3, [1, 0.4, 0.4]),
        (Infinite(begin="constant", constant_ratio=0.4, anneal_steps=2, anneal="linear", min_lr_ratio=0.2), 4, [0.4, 0.4, 0.3, 0.2]),
        (
            Infinite(warmup_steps=1, cooldown_steps=4, constant_ratio=0.4, anneal_steps=2, anneal="linear"),
            5,
            [1, 0.7 + 0.3 * 0.5**0.5, 0.7, 0.4, 0.1],
        ),
        (Rewarm(warmup_steps=2, min_lr_ratio=0.2, peak_ratio=0.6), 8, [0.5, 1, 0.6, 0.2, 0.4, 0.6, 0.4, 0.2]),
        (Rewarm(cycles=1, warmup_steps=4, start_ratio=0.2, min_lr_ratio=0.0), 6, [0.4, 0.6, 0.8, 1, 0.5, 0]),
        (Rewarm(min_lr_ratio=0.0), 5, [1, 0.5, 0, 1, 0]),
        (Rewarm(cycles=3, min_lr_ratio=0.5, peak_ratio=0.1), 4, [1, 0.5, 0.1, 0.01]),
    ],
    ids=str,
)
def test_factors_are_as_computed_by_hand(schedule: Any, num_steps: int, factors: list[float]) -> None:
    assert _factors(schedule, num_steps) == pytest.approx(factors)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("warmup_steps", [None, 0, 1])
def test_a_run_of_one_step_is_at_the_peak(kind: Any, warmup_steps: int | None) -> None:
    assert kind(warmup_steps=warmup_steps).factor_at(1, 1) == 1.0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_warmup_zero_and_one_step_of_it_are_the_same(kind: Any) -> None:
    assert _factors(kind(), 7) == _factors(kind(warmup_steps=0), 7) == _factors(kind(warmup_steps=1), 7)
    assert _factors(kind(warmup_ratio=0.0), 7) == _factors(kind(), 7)


@pytest.mark.parametrize("kind", OF_ONE_PEAK, ids=lambda kind: kind.__name__)
def test_a_warmup_as_long_as_the_run_ends_at_the_peak_and_a_longer_one_below(kind: Any) -> None:
    assert _factors(kind(warmup_steps=4), 4) == [0.25, 0.5, 0.75, 1.0]
    assert _factors(kind(warmup_ratio=1.0), 4) == [0.25, 0.5, 0.75, 1.0]
    assert _factors(kind(warmup_steps=8), 4) == [0.125, 0.25, 0.375, 0.5]


@given(
    kind=st.sampled_from(OF_ONE_PEAK),
    warmup=st.integers(0, 50),
    num_steps=st.integers(1, 60),
)
def test_factors_climb_to_the_peak_and_then_only_fall(kind: Any, warmup: int, num_steps: int) -> None:
    factors = _factors(kind(warmup_steps=warmup), num_steps)
    peak = min(max(warmup, 1), num_steps)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if warmup <= num_steps:
        assert factors[peak - 1] == 1.0
    if warmup < num_steps and num_steps > 1 and kind is not Constant:
        assert factors[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_past_the_last_step_nothing_changes(kind: Any) -> None:
    schedule = kind(warmup_steps=2)
    assert schedule.factor_at(15, 10) == schedule.factor_at(10, 10)


@pytest.mark.parametrize(("ratio", "num_steps", "steps"), [(0.07, 100, 7), (0.1, 31, 4), (0.03, 10, 1), (0.0, 10, 0), (1.0, 10, 10)])
def test_a_ratio_is_rounded_up_to_whole_steps(ratio: float, num_steps: int, steps: int) -> None:
    assert steps_of(None, ratio, num_steps) == steps


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_warmup_is_given_once(kind: Any) -> None:
    with pytest.raises(ValueError, match="say the same thing twice"):
        kind(warmup_steps=0, warmup_ratio=0.0)


def test_decay_is_given_once() -> None:
    with pytest.raises(ValueError, match="`decay_steps` and `decay_ratio` say the same thing twice"):
        WSD(decay_steps=0, decay_ratio=0.0)


@given(cycles=st.integers(1, 9), warmup=st.integers(0, 9), num_steps=st.integers(1, 60))
def test_every_cycle_has_its_peak_and_its_end(cycles: int, warmup: int, num_steps: int) -> None:
    factors = _factors(Rewarm(cycles=cycles, warmup_steps=warmup, min_lr_ratio=0.25), num_steps)
    assert all(0 < factor <= 1 for factor in factors)
    if num_steps >= cycles * (max(warmup, 1) + 1):
        assert sum(factor == 1.0 for factor in factors) == cycles
        assert sum(
            factor == pytest.approx(0.25) and following > factor for factor, following in zip(factors, [*factors[1:], 1], strict=True)
        )
        assert factors[-1] == pytest.approx(0.25)


@given(trunk=st.integers(20, 40), branch_at=st.integers(10, 20), anneal=st.integers(0, 9))
def test_a_branch_goes_on_from_the_constant_part_whatever_the_length_of_its_trunk(trunk: int, branch_at: int, anneal: int) -> None:
    lengths: dict[str, Any] = {"warmup_steps": 3, "cooldown_steps": 5}
    whole = _factors(Infinite(**lengths, anneal_steps=anneal), branch_at + anneal)
    stem = _factors(Infinite(**lengths, anneal_steps=0), trunk)[:branch_at]
    branch = _factors(Infinite(begin="constant", anneal_steps=anneal), anneal) if anneal else []
    assert whole == pytest.approx([*stem, *branch])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cooldown_steps": 0, "cooldown_ratio": 0.0}, "`cooldown_steps` and `cooldown_ratio` say the same thing twice"),
        ({"anneal_steps": 0, "anneal_ratio": 0.0}, "`anneal_steps` and `anneal_ratio` say the same thing twice"),
        ({"min_lr_ratio": 0.9}, "is above `constant_ratio`"),
        ({"begin": "constant", "warmup_steps": 3}, "`warmup_steps` is not read with `begin: constant`"),
    ],
)
def test_settings_of_the_infinite_schedule_that_contradict_each_other_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Infinite(**settings)
