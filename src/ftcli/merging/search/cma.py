"""CMA-ES: a normal distribution that moves and stretches towards better points. Seeded, and the same points on every run.

Source: Hansen 2016, arXiv:1604.00772, with its default parameters; points outside the box are moved to its border before they are
evaluated, and the distribution learns from where they were moved to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class CmaEs:
    """Asks for points in the unit box, is told how good they are (larger is better), and asks again."""

    def __init__(self, start: Sequence[float], step: float, seed: int) -> None:
        """
        Args:
            start: the middle of the first points.
            step: their standard deviation, of a box of width 1.
        """
        n = len(start)
        self.size = 4 + int(3 * math.log(n)) if n > 1 else 4
        self._random = np.random.default_rng(seed)
        self._mean, self._step = np.clip(np.array(start, np.float64), 0, 1), step
        num_parents = self.size // 2
        raw = np.log((self.size + 1) / 2) - np.log(np.arange(1, num_parents + 1))
        self._weights = raw / raw.sum()
        self._effective = 1 / float(np.sum(self._weights**2))
        mu, sum_c = self._effective, 4 + self._effective / n
        self._rate_path = sum_c / (n + 4 + 2 * mu / n)
        self._rate_step = (mu + 2) / (n + mu + 5)
        self._rate_one = 2 / ((n + 1.3) ** 2 + mu)
        self._rate_mu = min(1 - self._rate_one, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
        self._damping = 1 + 2 * max(0.0, math.sqrt((mu - 1) / (n + 1)) - 1) + self._rate_step
        self._expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        self._path, self._step_path = np.zeros(n), np.zeros(n)
        self._covariance: Vector = np.eye(n)
        self._generation = 0

    def ask(self) -> list[Vector]:
        """The points of the next generation, all in the box."""
        values, axes = np.linalg.eigh(self._covariance)
        root = axes * np.sqrt(np.maximum(values, 1e-20))
        normal = self._random.standard_normal((self.size, len(self._mean)))
        return [np.clip(self._mean + self._step * (root @ row), 0, 1) for row in normal]

    def tell(self, points: Sequence[Vector], values: Sequence[float]) -> None:
        """Learn from a generation; what is not a number counts as worst."""
        ranked = sorted(range(len(points)), key=lambda i: (-values[i] if values[i] == values[i] else math.inf, i))
        steps = np.array([(points[i] - self._mean) / self._step for i in ranked[: len(self._weights)]])
        move = self._weights @ steps
        values_of, axes = np.linalg.eigh(self._covariance)
        whitened = axes @ ((axes.T @ move) / np.sqrt(np.maximum(values_of, 1e-20)))
        self._generation += 1
        n, mu = len(self._mean), self._effective
        self._mean = np.clip(self._mean + self._step * move, 0, 1)
        self._step_path = (1 - self._rate_step) * self._step_path + math.sqrt(self._rate_step * (2 - self._rate_step) * mu) * whitened
        length = float(np.linalg.norm(self._step_path))
        decay = math.sqrt(1 - (1 - self._rate_step) ** (2 * self._generation))
        is_short = length / decay < (1.4 + 2 / (n + 1)) * self._expected
        self._path = (1 - self._rate_path) * self._path
        if is_short:
            self._path += math.sqrt(self._rate_path * (2 - self._rate_path) * mu) * move
        kept = 0.0 if is_short else self._rate_path * (2 - self._rate_path)
        rank_mu = np.einsum("i,ij,ik->jk", self._weights, steps, steps)
        self._covariance = (
            (1 - self._rate_one - self._rate_mu + self._rate_one * kept) * self._covariance
            + self._rate_one * np.outer(self._path, self._path)
            + self._rate_mu * rank_mu
        )
        self._step = min(1.0, self._step * math.exp((length / self._expected - 1) * self._rate_step / self._damping))
