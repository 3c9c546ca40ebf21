"""How often 95 % intervals of `ftcli eval` hold the truth: of means of few and of skewed rows, and of differences of paired shares.

    python scripts/bench/intervals.py [--draws 1000]

Means are drawn, with 1,000 resamples each; differences of right-or-wrong rows are counted out over all that can come. Seeded; about two
minutes on one core. Printed are two tables in Markdown.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ftcli.evaluation.statistics import bootstrap_mean, paired_shares

ROWS = (4, 20, 60, 100)
PAIRED_ROWS = (30, 60, 100, 200, 400)
ONLY_ONE_RIGHT = ((0.02, 0.0), (0.03, 0.03), (0.05, 0.02), (0.1, 0.05), (0.1, 0.1), (0.2, 0.05))
"""(share of rows that only A has right, that only B has)."""

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]


def scores(generator: np.random.Generator, rows: int) -> NDArray[np.float64]:
    """As F1 scores are: 40 % are 0, 20 % are 1, the rest between."""
    kind, between = generator.random(rows), generator.random(rows)
    return np.where(kind < 0.4, 0.0, np.where(kind < 0.6, 1.0, between))


VALUES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda generator, rows: generator.normal(size=rows), 0.0),
    "scores with many 0 and 1": (scores, 0.4),
    "exponential": (lambda generator, rows: generator.exponential(size=rows), 1.0),
    "lognormal": (lambda generator, rows: generator.lognormal(size=rows), math.exp(0.5)),
}
"""Name -> how rows are drawn, and their true mean."""


def of_means(draw: Draw, truth: float, rows: int, draws: int) -> float:
    """Share of the intervals that hold the true mean."""
    generator = np.random.default_rng(5)
    found = [bootstrap_mean(draw(generator, rows), seed=seed, resamples=1000) for seed in range(draws)]
    return sum(interval.low <= truth <= interval.high for interval in found) / draws


def of_shares(only_a: float, only_b: float, rows: int) -> float:
    """How likely the interval holds the true difference, over all counts of rows that differ."""
    log_a, log_b = (math.log(share) if share > 0 else -math.inf for share in (only_a, only_b))
    found = 0.0
    for a in range(rows + 1):
        for b in range(rows - a + 1):
            log = math.lgamma(rows + 1) - math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(rows - a - b + 1)
            log += (a * log_a if a else 0.0) + (b * log_b if b else 0.0) + (rows - a - b) * math.log1p(-only_a - only_b)
            if log > -25:
                interval = paired_shares(a, b, rows)
                found += math.exp(log) * (interval.low <= only_a - only_b <= interval.high)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    print(f"| only A right, only B right | {' | '.join(f'{rows} rows' for rows in PAIRED_ROWS)} |\n|---|{'--:|' * len(PAIRED_ROWS)}")
    for only_a, only_b in ONLY_ONE_RIGHT:
        cells = [f"{of_shares(only_a, only_b, rows):.1%}" for rows in PAIRED_ROWS]
        print(f"| {only_a:.0%}, {only_b:.0%} | {' | '.join(cells)} |", flush=True)
    print(f"\n| rows are | {' | '.join(f'{rows} rows' for rows in ROWS)} |\n|---|{'--:|' * len(ROWS)}")
    for name, (draw, truth) in VALUES.items():
        print(f"| {name} | {' | '.join(f'{of_means(draw, truth, rows, draws):.1%}' for rows in ROWS)} |", flush=True)


if __name__ == "__main__":
    main()
