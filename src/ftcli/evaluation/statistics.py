"""How sure a figure is, and whether one model is better than another on the same rows.

Everything here is exact or seeded, and works on plain arrays: one value a row (0 or 1 for right or wrong, a score, a loss).
Comparisons are always paired: the same rows, the difference of each. Sources: Wilson 1927 for proportions; Tango 1998, Statistics in
Medicine 17, for differences of paired ones; Efron & Tibshirani 1993, ch. 14 (BCa bootstrap) and 15 (permutation), with the widening for
small samples of Hesterberg 2015, arXiv:1411.5279, section 5.3; McNemar 1947 in its exact form; Holm 1979 for several comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcli.evaluation.power import Z_95, detectable_share, minimum_detectable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

NUM_RESAMPLES = 10_000
# Resamples are drawn in parts of so many numbers, so that memory stays flat whatever the number of rows.
MAX_DRAWN = 4_000_000
# More rows than this are drawn in so many random blocks of equal size: sums of blocks have the same spread.
MAX_UNITS = 10_000
# Up to so many rows that differ, all 2^n sign flips are counted instead of drawn.
MAX_EXACT_FLIPS = 16


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A against B on the same rows; a positive difference says that A's values are higher."""

    difference: Interval
    p_value: float
    """Two-sided, by the test named in `test`."""
    test: str
    """`mcnemar` for right-or-wrong values, `permutation` for others."""
    num_rows: int
    num_only_a: int
    """Rows where A's value is the higher one."""
    num_only_b: int
    minimum_detectable: float
    """The smallest difference that as many rows would show in four of five tries at p < 0.05; infinite where that is not known."""

    def to_json(self) -> dict[str, object]:
        return {
            "difference": self.difference.to_json(),
            "p_value": self.p_value,
            "test": self.test,
            "rows": self.num_rows,
            "only_a": self.num_only_a,
            "only_b": self.num_only_b,
            "minimum_detectable": self.minimum_detectable if self.is_detectable_known else None,
        }

    @property
    def is_detectable_known(self) -> bool:
        return math.isfinite(self.minimum_detectable)

    def detectable_text(self) -> str:
        """From which difference on one would have been seen, in a few words."""
        return f"detectable from {self.minimum_detectable:.2g}" if self.is_detectable_known else "what is detectable is not known"


def wilson(successes: float, trials: int) -> Interval:
    """Wilson's 95 % interval of a proportion; it stays inside 0..1 and has a width even at 0 and 1.

    Raises:
        ValueError: there are no trials.

    Example:
        >>> interval = wilson(8, 10)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.49, 0.943)
    """
    if trials <= 0:
        raise ValueError("a proportion of no trials")
    z, share = Z_95, successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At the ends the bounds are exact; rounding would leave a 1e-17.
    return Interval(share, max(0.0, centre - half) if successes > 0 else 0.0, min(1.0, centre + half) if successes < trials else 1.0)


def bootstrap_mean(values: Values, *, seed: int = 0, resamples: int = NUM_RESAMPLES) -> Interval:
    """The mean with its percentile bootstrap interval over rows.

    Args:
        values: ``(n,)`` one number a row.
    """
    import numpy as np

    return bootstrap_ratio(values, np.ones_like(values), seed=seed, resamples=resamples)


def bootstrap_ratio(numerators: Values, denominators: Values, *, seed: int = 0, resamples: int = NUM_RESAMPLES) -> Interval:
    """sum(numerators) / sum(denominators) with its bootstrap interval over rows: bits per byte over documents, a weighted mean.

    Args:
        numerators, denominators: ``(n,)`` of the same rows, which are drawn together.

    Raises:
        ValueError: there are no rows, or the denominators sum to 0.
    """
    import numpy as np

    total = float(denominators.sum()) if len(denominators) else 0.0
    if total == 0.0:
        raise ValueError("an average over nothing")
    estimate = float(numerators.sum()) / total
    if len(numerators) == 1:
        return Interval(estimate, -math.inf, math.inf)  # one row says nothing of the spread
    drawn = np.concatenate([tops / bottoms for tops, bottoms in _resampled_sums((numerators, denominators), seed, resamples)])
    left_out = (numerators.sum() - numerators) / np.where(denominators == total, np.nan, total - denominators)
    low, high = np.quantile(drawn, _bca_levels(drawn, estimate, left_out))
    return Interval(estimate, float(low), float(high))


def bootstrap_counts(
    rows: Values,
    score: Callable[[Values], Values],
    *,
    repeats: NDArray[np.int64] | None = None,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> tuple[Interval, Values]:
    """A score of sums over rows that is no mean of theirs (BLEU, macro-F1, a calibration error), with its bootstrap interval.

    Args:
        rows: ``(n, k)`` counts of each row.
        score: ``(..., k)`` sums -> ``(...)``.
        repeats: ``(n,)`` how often each row occurs; equal rows need to be given only once.

    Returns:
        The interval, and ``(n,)`` what each row pulls the score to: their mean (over all repeats) is the score, and rows that pull
        up are above it, so that two models can be compared row by row. The pull is that of the jackknife: Efron & Tibshirani 1993,
        chapter 11.
    """
    import numpy as np

    repeats = np.ones(len(rows), dtype=np.int64) if repeats is None else repeats
    count, total = int(repeats.sum()), repeats @ rows
    estimate = float(score(total))
    if count == 1:
        return Interval(estimate, -math.inf, math.inf), np.full(len(rows), estimate)
    left_out = score(total - rows)
    pulls = estimate + (count - 1) * (np.average(left_out, weights=repeats) - left_out)
    drawn = np.concatenate([score(sums) for sums in _resampled(rows, repeats, seed, resamples)])
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, _bca_levels(drawn, estimate, left_out, repeats))
    return Interval(estimate, float(low), float(high)), pulls


def _bca_levels(drawn: Values, estimate: float, left_out: Values, repeats: NDArray[np.int64] | None = None) -> tuple[float, float]:
    """The quantiles of `drawn` that bound 95 %, corrected for bias, skew and a small number of rows.

    Args:
        left_out: ``(n,)`` the estimate without each row.
        repeats: ``(n,)`` how often each row occurs; once where not given.
    """
    from statistics import NormalDist

    import numpy as np

    left_out = left_out if repeats is None else np.repeat(left_out, repeats)
    normal, count = NormalDist(), len(left_out)
    below = float((drawn < estimate).mean() + 0.5 * (drawn == estimate).mean())
    bias = normal.inv_cdf(min(max(below, 1 / len(drawn)), 1 - 1 / len(drawn)))
    pulls = np.nanmean(left_out) - left_out[~np.isnan(left_out)]
    spread = float((pulls**2).sum())
    skew = float((pulls**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    reach = math.sqrt(count / (count - 1)) * _t_quantile(count - 1)
    levels = [normal.cdf(bias + (bias + z) / (1 - skew * (bias + z))) for z in (-reach, reach)]
    return levels[0], levels[1]


def _t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; Cornish-Fisher, within 1 % from 3 degrees on."""
    z = Z_95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def _resampled_sums(columns: Sequence[Values], seed: int, resamples: int) -> Iterator[tuple[Values, ...]]:
    """Sums of each column over resampled rows, in parts."""
    import numpy as np

    stacked = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
    for sums in _resampled(stacked, np.ones(len(stacked), dtype=np.int64), seed, resamples):
        yield tuple(sums[:, index] for index in range(len(columns)))


def _resampled(rows: Values, repeats: NDArray[np.int64], seed: int, resamples: int) -> Iterator[Values]:
    """(part, k) sums over resampled rows, in parts; counts of rows are multinomial."""
    import numpy as np

    generator = np.random.default_rng(seed)
    if len(rows) > MAX_UNITS:
        # All rows are in a block: sizes differ by one, which a ratio of sums is indifferent to.
        owners = np.repeat(np.arange(len(rows)), repeats)
        blocks = generator.permutation(len(owners)) % MAX_UNITS
        rows = np.stack([np.bincount(blocks, weights=column[owners], minlength=MAX_UNITS) for column in rows.T], axis=1)
        repeats = np.ones(MAX_UNITS, dtype=np.int64)
    count = int(repeats.sum())
    part = max(1, min(resamples, MAX_DRAWN // len(rows)))
    for start in range(0, resamples, part):
        counts = generator.multinomial(count, repeats / count, size=min(part, resamples - start))
        yield counts @ rows


def compare(
    a: Values,
    b: Values,
    *,
    a_weights: Values | None = None,
    b_weights: Values | None = None,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> Comparison:
    """A against B, row by row: McNemar's exact test where all values are 0 or 1, else the sign-flip permutation test.

    With weights the difference is that of the two weighted means, and interval and test are of that difference, too.

    Args:
        a, b: ``(n,)`` values of the same rows in the same order.
        a_weights, b_weights: ``(n,)`` how much each row counts in A's and in B's mean; both or neither.

    Raises:
        ValueError: the rows are not the same, there are none, or none of them counts.
    """
    import numpy as np

    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"{len(a)} rows against {len(b)}")
    values, others = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    only_a, only_b = int((values > others).sum()), int((values < others).sum())
    is_binary = a_weights is None and bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    differences = row_differences(values, others, a_weights, b_weights)
    p_value = mcnemar(only_a, only_b) if is_binary else sign_flip(differences, seed=seed, resamples=resamples)
    if is_binary:
        interval = paired_shares(only_a, only_b, len(a))
    elif not differences.any():
        interval = Interval(0.0, 0.0, 0.0)
    elif a_weights is None or b_weights is None:
        interval = bootstrap_mean(differences, seed=seed, resamples=resamples)
    else:
        interval = _ratio_difference((values, a_weights), (others, b_weights), seed, resamples)
    return Comparison(
        difference=interval,
        p_value=p_value,
        test="mcnemar" if is_binary else "permutation",
        num_rows=len(a),
        num_only_a=only_a,
        num_only_b=only_b,
        minimum_detectable=detectable_share(only_a + only_b, len(a)) if is_binary else minimum_detectable(differences),
    )


def row_differences(a: Values, b: Values, a_weights: Values | None = None, b_weights: Values | None = None) -> Values:
    """(n,) what each row adds to the difference of two means, weighted or not: their plain mean is that difference.

    Of a row that both weigh alike it is the weighted difference of its values, so that a sign that is flipped swaps the two models.
    Where weights differ (the tokens of two tokenizers) values are counted from the middle of the two means, so that a long row is
    not taken for a better one.

    Raises:
        ValueError: only one has weights, or they sum to 0.
    """
    if a_weights is None and b_weights is None:
        return a - b
    if a_weights is None or b_weights is None:
        raise ValueError("one mean is weighted, and the other is not")
    a_total, b_total = float(a_weights.sum()), float(b_weights.sum())
    if a_total <= 0 or b_total <= 0:
        raise ValueError("an average over nothing")
    if bool((a_weights == b_weights).all()):
        return len(a) * a_weights * (a - b) / a_total
    middle = (_mean(a, a_weights) + _mean(b, b_weights)) / 2
    return len(a) * ((a - middle) * a_weights / a_total - (b - middle) * b_weights / b_total)


def _ratio_difference(a: tuple[Values, Values], b: tuple[Values, Values], seed: int, resamples: int) -> Interval:
    """The difference of two weighted means with its bootstrap interval over rows.

    Args:
        a, b: values and weights, ``(n,)`` each.
    """
    import numpy as np

    rows = np.stack([a[0] * a[1], a[1], b[0] * b[1], b[1]], axis=1)

    def difference(sums: Values) -> Values:
        # Where no row that counts is drawn, or the only one is left out, there is no number.
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Values = sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]
        return found

    return bootstrap_counts(rows, difference, seed=seed, resamples=resamples)[0]


def _mean(values: Values, weights: Values) -> float:
    return float((values * weights).sum() / weights.sum())


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test, from the numbers of rows that only one of the two has right.

    Example:
        >>> mcnemar(0, 0), mcnemar(1, 9), mcnemar(9, 1)
        (1.0, 0.021484375, 0.021484375)
    """
    count, least = only_a + only_b, min(only_a, only_b)
    if count == 0:
        return 1.0
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2) for k in range(least + 1)]
    tail = math.fsum(math.exp(log) for log in logs)
    return 1.0 if 2 * least == count else min(1.0, float(f"{2 * tail:.12g}"))


def paired_shares(only_a: int, only_b: int, num_rows: int) -> Interval:
    """The difference of two shares on the same rows with its 95 % score interval; it has a width even where no row differs.

    At 0 the score test is McNemar's without correction, which is bolder than the exact one: with 5 rows to 0 the interval is beside 0
    and the exact p is 0.06. Source: Tango 1998, Statistics in Medicine 17, 891-908, equations 13 to 16.

    Raises:
        ValueError: there are no rows.

    Example:
        >>> interval = paired_shares(12, 2, 44)
        >>> round(interval.value, 3), round(interval.low, 3), round(interval.high, 3)
        (0.227, 0.069, 0.386)
    """
    if num_rows <= 0:
        raise ValueError("a difference on no rows")
    value = (only_a - only_b) / num_rows

    def is_inside(difference: float) -> bool:
        # The share of rows that only B has right, as likely as can be if the difference is this one.
        linear = (2 * num_rows - only_a + only_b) * difference - only_a - only_b
        spread = math.sqrt(max(0.0, linear**2 + 8 * num_rows * only_b * difference * (1 - difference)))
        share = (spread - linear) / (4 * num_rows)
        variance = num_rows * (2 * share + difference * (1 - difference))
        return (num_rows * (value - difference)) ** 2 <= Z_95**2 * variance

    return Interval(value, _last_inside(is_inside, value, -1.0), _last_inside(is_inside, value, 1.0))


def _last_inside(is_inside: Callable[[float], bool], inner: float, outer: float) -> float:
    """Where what holds at `inner` ends on the way to `outer`; by halves, to the last digit."""
    for _ in range(60):
        middle = (inner + outer) / 2
        inner, outer = (middle, outer) if is_inside(middle) else (inner, middle)
    return inner


def sign_flip(differences: Values, *, seed: int = 0, resamples: int = NUM_RESAMPLES) -> float:
    """Two-sided p of the paired permutation test: how often random signs give a mean at least as far from 0.

    Exact, over all flips, for few rows that differ; else drawn, the observed one counted with them, so that p is never 0.
    """
    import numpy as np

    moved = np.asarray(differences, dtype=np.float64)
    moved = moved[moved != 0]
    if len(moved) == 0:
        return 1.0
    observed = abs(float(moved.sum())) * (1 - 1e-12)
    if len(moved) <= MAX_EXACT_FLIPS:
        signs = 1 - 2 * ((np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved))) & 1)
        return float((np.abs(signs @ moved) >= observed).mean())
    generator, extreme = np.random.default_rng(seed), 0
    if len(moved) > MAX_UNITS:
        # Signs flipped by random blocks are signs flipped by rows, only fewer of them: the test stays exact.
        moved = np.bincount(generator.permutation(len(moved)) % MAX_UNITS, weights=moved, minlength=MAX_UNITS).astype(np.float64)
    part = max(1, min(resamples, MAX_DRAWN // len(moved)))
    for start in range(0, resamples, part):
        signs = generator.integers(0, 2, size=(min(part, resamples - start), len(moved)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ moved) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p of several tests, in their order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
