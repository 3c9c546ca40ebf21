"""The standard error of a held-out loss is that of a ratio of sums over examples, however they are cut into batches."""

from __future__ import annotations

import math

import numpy as np
import torch

from ftcli.evaluation.loss import _moments, _standard_error
from ftcli.objectives.objective import Losses


def test_it_is_the_ratio_estimators_and_does_not_depend_on_the_cut() -> None:
    generator = np.random.default_rng(0)
    examples = np.sort(generator.integers(0, 6, 40))
    examples[:6] = np.arange(6)  # none is empty
    examples.sort()
    values, weights = generator.exponential(1.0, 40), generator.choice([0.5, 1.0], 40)
    x, w = (np.bincount(examples, weights=column, minlength=6) for column in (values * weights, weights))
    ratio = x.sum() / w.sum()
    expected = math.sqrt(((x - ratio * w) ** 2).sum() * 6 / 5) / w.sum()

    def sums(first: int, last: int) -> list[float]:
        chosen = (examples >= first) & (examples < last)
        losses = Losses(torch.tensor(values[chosen]), torch.tensor(weights[chosen]), torch.tensor(examples[chosen] - first))
        return [float(value) for value in _moments(losses, last - first)]

    for cut in (2, 5):
        moments = [a + b for a, b in zip(sums(0, cut), sums(cut, 6), strict=True)]
        assert math.isclose(_standard_error(float(x.sum()), float(w.sum()), *moments), expected, rel_tol=1e-9)


def test_one_example_says_nothing_of_the_spread() -> None:
    assert _standard_error(2.0, 1.0, 1.0, 4.0, 1.0, 2.0) == 0.0
