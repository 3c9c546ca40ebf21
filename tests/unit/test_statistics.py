"""Intervals cover what they should, paired tests keep their identities."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from ftcli.evaluation.power import detectable_share, minimum_detectable
from ftcli.evaluation.statistics import (
    bootstrap_counts,
    bootstrap_mean,
    bootstrap_ratio,
    compare,
    holm,
    mcnemar,
    paired_shares,
    row_differences,
    sign_flip,
    wilson,
)

TRIALS = 600


def covered(draw, interval, truth: float) -> float:
    """Share of intervals, over many data sets, that hold the truth."""
    generator = np.random.default_rng(7)
    found = [interval(draw(generator)) for _ in range(TRIALS)]
    return sum(one.low <= truth <= one.high for one in found) / TRIALS


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_wilson_covers_a_proportion(share: float) -> None:
    rate = covered(lambda g: (g.random(120) < share).sum(), lambda count: wilson(int(count), 120), share)
    assert 0.93 <= rate <= 0.975


def test_bootstrap_covers_the_mean_of_skewed_values() -> None:
    rate = covered(lambda g: g.gamma(2.0, 1.0, 90), lambda values: bootstrap_mean(values, resamples=800), 2.0)
    assert 0.93 <= rate <= 0.97


def test_bootstrap_covers_a_ratio_of_sums_over_documents() -> None:
    def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        sizes = generator.integers(20, 200, 90).astype(float)
        return sizes * generator.gamma(4.0, 0.25, 90), sizes

    rate = covered(draw, lambda columns: bootstrap_ratio(*columns, resamples=800), 1.0)
    assert 0.925 <= rate <= 0.97


def test_bootstrap_covers_a_score_of_counts() -> None:
    """Micro-F1 of a population whose confusions are known."""
    shares = np.array([0.55, 0.15, 0.1, 0.2])  # true positives, false positives, false negatives, neither
    truth = 2 * shares[0] / (2 * shares[0] + shares[1] + shares[2])

    def f1(sums: np.ndarray) -> np.ndarray:
        return 2 * sums[..., 0] / (2 * sums[..., 0] + sums[..., 1] + sums[..., 2])

    rate = covered(lambda g: np.eye(4)[g.choice(4, 100, p=shares)], lambda rows: bootstrap_counts(rows, f1, resamples=800)[0], truth)
    assert 0.93 <= rate <= 0.97


def test_the_interval_of_a_paired_difference_covers_it() -> None:
    def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        shared = generator.gamma(2.0, 1.0, 90)
        return shared + generator.exponential(0.5, 90), shared

    rate = covered(draw, lambda both: compare(*both, resamples=800).difference, 0.5)
    assert 0.93 <= rate <= 0.97


def test_an_effect_of_the_detectable_size_shows_in_four_of_five_tries() -> None:
    generator = np.random.default_rng(13)
    effect = minimum_detectable(generator.normal(0, 1, 100_000)) * math.sqrt(100_000 / 60)
    shown = sum(sign_flip(generator.normal(effect, 1, 60), resamples=400) < 0.05 for _ in range(400)) / 400
    assert shown == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("rows", [30, 60, 100, 400])
@pytest.mark.parametrize(("only_a", "only_b"), [(0.05, 0.02), (0.1, 0.05), (0.03, 0.03), (0.02, 0.0), (0.1, 0.1)])
def test_the_interval_of_paired_shares_covers_their_difference(rows: int, only_a: float, only_b: float) -> None:
    draws = np.random.default_rng(23).multinomial(rows, [only_a, only_b, 1 - only_a - only_b], size=4000)
    held = 0
    for (a, b, _), times in zip(*np.unique(draws, axis=0, return_counts=True), strict=True):
        interval = paired_shares(int(a), int(b), rows)
        held += times * (interval.low <= only_a - only_b <= interval.high)
    # Where on average few rows differ, only whole counts of them can come, and the interval errs on the safe side.
    assert 0.93 <= held / 4000 <= (0.98 if rows * (only_a + only_b) >= 4 else 1.0)


def test_the_interval_of_paired_shares_is_beside_0_where_the_score_test_says_so() -> None:
    for only_a in range(12):
        for only_b in range(12 - only_a):
            interval, back = paired_shares(only_a, only_b, 20), paired_shares(only_b, only_a, 20)
            assert (interval.low, interval.high) == pytest.approx((-back.high, -back.low), abs=1e-12)
            assert interval.low < interval.high
            is_shown = (only_a - only_b) ** 2 > 1.959963984540054**2 * (only_a + only_b)
            assert is_shown == (not interval.low <= 0 <= interval.high)
            assert is_shown or mcnemar(only_a, only_b) > 0.05


def test_right_and_wrong_rows_that_do_not_differ_leave_the_difference_a_width() -> None:
    answers = np.repeat([0.0, 1.0], 15)
    found = compare(answers, answers)
    assert (found.difference.value, found.p_value) == (0.0, 1.0)
    # The least and greatest differences d of which the score test says (30 d)^2 = 1.96^2 * 30 d (1 - d) with no row that differs.
    assert (-found.difference.low, found.difference.high) == pytest.approx((1.96**2 / (30 + 1.96**2),) * 2, abs=1e-4)
    with pytest.raises(ValueError, match="no rows"):
        paired_shares(0, 0, 0)


@pytest.mark.parametrize(
    ("differ", "rows"), [(0, 24), (2, 40), (6, 24), (24, 24), (4, 400), (36, 400), (100, 400), (101, 400), (300, 1000)]
)
def test_a_difference_of_shares_of_the_detectable_size_shows_in_four_of_five_tries(differ: int, rows: int) -> None:
    effect = detectable_share(differ, rows)
    assert 6 / rows < effect <= 1
    generator, share = np.random.default_rng(29), max(effect, differ / rows)
    different = generator.binomial(rows, share, 3000)
    in_favour = generator.binomial(different, (1 + effect / share) / 2)
    shown = sum(mcnemar(a, both - a) < 0.05 for a, both in zip(in_favour.tolist(), different.tolist(), strict=True)) / 3000
    assert shown == pytest.approx(0.8, abs=0.025)


def test_what_no_such_rows_can_show_is_not_known() -> None:
    assert mcnemar(6, 0) < 0.05 < mcnemar(5, 0)
    assert detectable_share(2, 5) == math.inf
    assert minimum_detectable(np.array([0.5, -0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.3, 0.9])) == math.inf  # 5 rows differ
    assert minimum_detectable(np.full(30, 0.25)) == math.inf
    same = compare(np.full(30, 0.5), np.full(30, 0.5))
    assert (same.detectable_text(), same.to_json()["minimum_detectable"]) == ("what is detectable is not known", None)
    right = compare(np.ones(40), np.r_[np.zeros(2), np.ones(38)])
    assert right.minimum_detectable == detectable_share(2, 40)
    assert right.detectable_text() == "detectable from 0.19"


@pytest.mark.parametrize(("hits", "rows"), [(0, 7), (7, 7), (3, 11), (61, 100), (1999, 2000)])
def test_wilson_and_mcnemar_are_those_of_scipy(hits: int, rows: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(hits, rows)
    interval = wilson(hits, rows)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.proportion_ci(method="wilson")), abs=1e-12)
    assert mcnemar(hits, rows - hits) == pytest.approx(expected.pvalue, rel=1e-9)


def test_flipped_signs_are_scipys_permutation_test() -> None:
    from scipy.stats import permutation_test

    differences = np.random.default_rng(17).normal(0.5, 1.0, 11)
    both = (differences, np.zeros_like(differences))
    expected = permutation_test(both, lambda a, b: (a - b).mean(), permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(differences) == pytest.approx(expected.pvalue, abs=1e-12)


def test_the_bootstrap_of_many_rows_is_scipys() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(19).gamma(1.0, 1.0, 400)
    expected = bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(0)).confidence_interval
    found = bootstrap_mean(values, resamples=20_000)
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.high, abs=0.03 * width)


def test_a_model_against_itself_does_not_differ() -> None:
    values = np.random.default_rng(0).random(50)
    found = compare(values, values)
    assert (found.difference.value, found.difference.low, found.difference.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("is_binary", [True, False])
def test_swapping_the_models_flips_the_sign_and_keeps_p(is_binary: bool) -> None:
    generator = np.random.default_rng(1)
    a, b = generator.random(60), generator.random(60)
    if is_binary:
        a, b = (a < 0.8).astype(float), (b < 0.5).astype(float)
    there, back = compare(a, b), compare(b, a)
    assert there.difference.value == -back.difference.value
    assert there.p_value == pytest.approx(back.p_value, rel=0.05)
    assert (there.num_only_a, there.num_only_b) == (back.num_only_b, back.num_only_a)
    assert there.test == ("mcnemar" if is_binary else "permutation")


def test_mcnemar_is_the_exact_binomial_test() -> None:
    # 2 * (1 + 10 + 45) / 1024 for 2 against 8
    assert mcnemar(2, 8) == pytest.approx(2 * 56 / 1024)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)


def test_drawn_sign_flips_agree_with_all_of_them() -> None:
    differences = np.random.default_rng(3).normal(0.4, 1.0, 16)
    exact = sign_flip(differences)
    drawn = sign_flip(np.concatenate([differences, [1e-12]]), resamples=40_000)
    assert drawn == pytest.approx(exact, abs=0.01)


def test_a_test_without_an_effect_says_so_at_its_rate() -> None:
    generator = np.random.default_rng(11)
    rejected = sum(sign_flip(generator.normal(0, 1, 30), resamples=400) < 0.05 for _ in range(400)) / 400
    assert rejected < 0.08


def test_holm_never_lowers_a_p_and_keeps_their_order() -> None:
    values = [0.2, 0.001, 0.03, 0.04]
    adjusted = holm(values)
    assert adjusted == [0.2, 0.004, 0.09, 0.09]
    assert holm([]) == []


def test_more_rows_detect_less() -> None:
    differences = np.random.default_rng(5).normal(0, 1, 400)
    assert minimum_detectable(differences) == pytest.approx(2 * minimum_detectable(np.concatenate([differences] * 4)), rel=0.01)
    assert minimum_detectable(differences[:1]) == math.inf
    assert detectable_share(40, 400) == pytest.approx(2 * detectable_share(160, 1600), rel=0.05)


def test_an_average_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        bootstrap_mean(np.zeros(0))
    with pytest.raises(ValueError, match="no trials"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="3 rows against 2"):
        compare(np.zeros(3), np.zeros(2))


def test_more_rows_than_units_are_drawn_in_blocks_with_the_same_spread() -> None:
    values = np.random.default_rng(3).exponential(size=25_013)
    interval = bootstrap_mean(values, resamples=1500)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.1)
    differences = np.random.default_rng(4).normal(0.02, 1, size=25_013)
    z = differences.mean() / differences.std() * np.sqrt(len(differences))
    assert sign_flip(differences, resamples=1500) == pytest.approx(2 * (1 - NormalDist().cdf(z)), abs=0.02)


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_weighted_difference_is_that_of_the_two_weighted_means(share: float | None) -> None:
    generator = np.random.default_rng(3)
    sizes = generator.integers(1, 500, 60).astype(float)
    others = sizes if share is None else np.round(sizes * generator.uniform(share, 1, 60)) + 1
    a, b = generator.normal(2, 1, 60), generator.normal(1.9, 1, 60)
    found = compare(a, b, a_weights=sizes, b_weights=others)
    expected = np.average(a, weights=sizes) - np.average(b, weights=others)
    assert found.difference.value == pytest.approx(expected, abs=1e-12)
    assert found.difference.low < expected < found.difference.high
    assert row_differences(a, b, sizes, others).mean() == pytest.approx(expected, abs=1e-12)
    back = compare(b, a, a_weights=others, b_weights=sizes)
    assert (back.difference.value, back.p_value) == (pytest.approx(-found.difference.value), pytest.approx(found.p_value, abs=0.02))


def test_equal_weights_change_nothing() -> None:
    generator = np.random.default_rng(4)
    a, b = generator.normal(0.2, 1, 40), generator.normal(0, 1, 40)
    plain, weighed = compare(a, b), compare(a, b, a_weights=np.full(40, 7.0), b_weights=np.full(40, 7.0))
    assert weighed.difference.value == pytest.approx(plain.difference.value)
    assert weighed.p_value == pytest.approx(plain.p_value, abs=1e-9)
    assert weighed.difference.low == pytest.approx(plain.difference.low, abs=0.02)
    assert weighed.minimum_detectable == pytest.approx(plain.minimum_detectable)


def test_a_weighted_test_holds_its_level_where_weights_are_those_of_two_tokenizers() -> None:
    generator, rejected = np.random.default_rng(5), 0
    for _ in range(300):
        sizes = generator.integers(5, 200, 40).astype(float)
        others = np.round(sizes * generator.uniform(0.6, 1.4, 40)) + 1
        a, b = (2 + generator.normal(0, 0.2, 40) for _ in range(2))
        rejected += sign_flip(row_differences(a, b, sizes, others), resamples=400) < 0.05
    assert rejected / 300 < 0.09


def test_a_row_without_weight_counts_for_nothing_and_breaks_nothing() -> None:
    found = compare(np.array([1.0, 9.0]), np.array([2.0, 0.0]), a_weights=np.array([3.0, 0.0]), b_weights=np.array([3.0, 0.0]))
    assert found.difference.value == -1
    assert not np.isnan(found.minimum_detectable)
    with pytest.raises(ValueError, match="an average over nothing"):
        compare(np.array([1.0, 2.0]), np.array([2.0, 1.0]), a_weights=np.zeros(2), b_weights=np.zeros(2))
