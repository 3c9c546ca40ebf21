"""From which difference on a comparison of the same rows would have seen it: at p < 0.05, in four of five tries."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

# Quantiles of the normal distribution: of 95 % on two sides, and of a power of 80 %.
Z_95, Z_POWER = 1.959963984540054, 0.8416212335729143
POWER = 0.8
# Fewer rows that differ cannot give p < 0.05, even if all are in one's favour: 2 / 2^5 is 0.0625.
MIN_DIFFERING = 6
# Up to so many differing rows the power of McNemar's test is counted out.
MAX_COUNTED = 100


def minimum_detectable(differences: Values) -> float:
    """The smallest mean difference that as many rows with this spread show in four of five tries at p < 0.05; infinite if not known.

    It is not known where fewer rows differ than could give such a p, which says nothing of the spread.
    """
    import numpy as np

    if np.count_nonzero(differences) < MIN_DIFFERING or float(np.ptp(differences)) == 0.0:
        return math.inf
    return (Z_95 + Z_POWER) * float(np.std(differences, ddof=1)) / math.sqrt(len(differences))


@lru_cache(maxsize=4096)
def detectable_share(num_differ: int, num_rows: int) -> float:
    """The smallest difference of two shares that McNemar's exact test shows in four of five tries at p < 0.05.

    It is that of `num_rows` rows of which on average as many differ as `num_differ`; where that difference needs more of them, all that
    differ are in one's favour. Infinite for fewer rows than can give such a p.

    Example:
        >>> round(detectable_share(0, 40), 3), round(detectable_share(40, 400), 3), detectable_share(2, 5)
        (0.19, 0.046, inf)
    """
    if num_rows < MIN_DIFFERING:
        return math.inf
    if _tail(num_differ / num_rows, num_rows) < POWER:
        return _least(lambda share: _tail(share, num_rows), 1.0)
    if num_differ > MAX_COUNTED:
        # The normal approximation with the correction for continuity: Connor 1987, Biometrics 43.
        differing, found = num_differ / num_rows, 0.0
        for _ in range(20):
            found = (1 + Z_95 * math.sqrt(num_differ) + Z_POWER * math.sqrt(num_rows * max(0.0, differing - found**2))) / num_rows
        return found
    return _least(_power_of_mcnemar(num_differ, num_rows), num_differ / num_rows)


def _least(power: Callable[[float], float], high: float) -> float:
    """The smallest difference in 0..`high` that has the power."""
    low = 0.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def _tail(share: float, num_rows: int) -> float:
    """How likely at least `MIN_DIFFERING` of the rows differ, if each does with this probability."""
    if share in (0.0, 1.0):
        return share
    return 1 - math.fsum(math.comb(num_rows, k) * share**k * (1 - share) ** (num_rows - k) for k in range(MIN_DIFFERING))


def _power_of_mcnemar(num_differ: int, num_rows: int) -> Callable[[float], float]:
    """How likely McNemar's exact p is below 0.05, by the difference of the shares."""
    import numpy as np

    differing = num_differ / num_rows
    reach = 6 * math.sqrt(num_differ) + 6  # farther out lies less than 1e-6
    counts = np.arange(MIN_DIFFERING, min(num_rows, int(num_differ + reach)) + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_rows + 1)))])  # of factorials
    rest = (num_rows - counts) * math.log1p(-differing) if differing < 1 else np.where(counts == num_rows, 0.0, -np.inf)
    of_counts = np.exp(logs[num_rows] - logs[counts] - logs[num_rows - counts] + counts * math.log(differing) + rest)
    won = np.arange(counts[-1] + 1)
    lost = counts[:, None] - won
    ways = np.where(lost >= 0, logs[counts][:, None] - logs[won] - logs[np.maximum(lost, 0)], -np.inf)
    # So many of the rows that differ may be against the rest before p reaches 0.05.
    limits = (2 * np.cumsum(np.exp(ways - counts[:, None] * math.log(2)), axis=1) < 0.05).sum(axis=1)[:, None]
    row, column = np.nonzero((lost >= 0) & ((won < limits) | (lost < limits)))
    ways, won, lost = ways[row, column], won[column], lost[row, column]

    def power(difference: float) -> float:
        favour = min((1 + difference / differing) / 2, 1 - 1e-12)
        return float((of_counts[row] * np.exp(ways + won * math.log(favour) + lost * math.log1p(-favour))).sum())

    return power
