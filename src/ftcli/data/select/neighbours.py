"""Nearest neighbours of the task set among what a model makes of texts, shared out over clusters of the task set.

Texts become the mean of a model's hidden states, whitened over a sample of the pool: raw means of a language model all point the same
way, and their cosines say little (whitening: Su et al. 2021, arXiv:2103.15316). A row's score is the mean cosine to its nearest rows
of the task set. The task set is clustered, and half of the rows are shared out over the clusters by their share of the task set, the
rest goes to the best of all: a selection that is all like one common row would not help the others, but a cluster that the pool has
nothing for is not to be filled up with strangers.
Source: kNN-TAPT of Gururangan et al. 2020, arXiv:2004.10964, section 4.3.
Legend: ``G`` rows of the task set, ``D`` hidden size, ``K`` clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcli.data.select.way import sample_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ftcli.data.select.pool import Pool
    from ftcli.data.select.way import Tell

    Vectors = NDArray[np.float32]

SAMPLE_ROWS = 1000
SAMPLE_CHARS = 2000
MAX_CLUSTERS = 50
SHARED_OUT = 0.5
"""Part of the rows that clusters choose: all of them cost 2 of 66 points of precision on the pools of scripts/bench/select_text.py, half
of them none."""
ITERATIONS = 20
SHRINKAGE = 0.1
"""Of the sample's covariance towards equal variances, in units of their mean: the directions of small variance are mostly noise."""

Encoder = Callable[[Sequence[str]], "Vectors"]
"""(n, D) one vector for each text."""


class Neighbours:
    """`--by embeddings`."""

    unit = "mean cosine to the nearest rows of the task set"

    def __init__(self, encode: Encoder, seed: int, neighbours: int = 10, num_clusters: int | None = None) -> None:
        """
        Args:
            num_clusters: of the task set; None takes the square root of its rows.
        """
        self.encode = encode
        self.seed = seed
        self.neighbours = neighbours
        self.num_clusters = num_clusters

    def fit(self, gold: Sequence[str], pool: Pool, tell: Tell) -> None:
        """Vectors of the task set, in units of the pool, and their clusters."""
        sample = self.encode(sample_of(pool, SAMPLE_ROWS, self.seed, SAMPLE_CHARS, tell))
        self._mean, self._whiten = sample.mean(axis=0), whitening(sample)
        self._gold = self._standard(self.encode(gold))
        wanted = self.num_clusters or min(MAX_CLUSTERS, round(math.sqrt(len(gold))))
        self._clusters = clusters_of(self._gold, min(wanted, len(gold)), self.seed)

    def _standard(self, vectors: Vectors) -> Vectors:
        """Directions of the vectors, of length 1, as seen from the middle of the pool."""
        white = (vectors - self._mean) @ self._whiten
        directions: Vectors = (white / np.maximum(np.linalg.norm(white, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        return directions

    def score(self, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The group of a row is the cluster of its nearest row of the task set."""
        cosines = self._standard(self.encode(texts)) @ self._gold.T
        count = min(self.neighbours, len(self._gold))
        nearest = np.partition(cosines, -count, axis=1)[:, -count:]
        # Rounded: sums of a machine depend on how texts were batched, and equal texts are to have equal scores.
        return np.round(nearest.mean(axis=1).astype(np.float64), 5), self._clusters[cosines.argmax(axis=1)]

    def noise(self, digests: NDArray[np.uint64]) -> NDArray[np.float64]:
        return np.zeros(len(digests))

    def quotas(self, count: int) -> list[int]:
        """By largest remainder, so that they add up to `SHARED_OUT` of `count`; one group has no quota to keep."""
        sizes = np.bincount(self._clusters)
        total = count if len(sizes) == 1 else int(SHARED_OUT * count)
        exact = total * sizes / sizes.sum()
        quotas = np.floor(exact).astype(np.int64)
        quotas[np.argsort(-(exact - quotas), kind="stable")[: total - int(quotas.sum())]] += 1
        return [int(quota) for quota in quotas]

    def facts(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours, "clusters": [int(size) for size in np.bincount(self._clusters)]}


def whitening(sample: Vectors) -> Vectors:
    """(D, D) the map under which a sample has about equal variance in all directions."""
    centred = (sample - sample.mean(axis=0)).astype(np.float64)
    covariance = centred.T @ centred / max(1, len(sample) - 1)
    variance = max(float(np.trace(covariance)) / len(covariance), 1e-12)
    values, directions = np.linalg.eigh(covariance + SHRINKAGE * variance * np.eye(len(covariance)))
    whiten: Vectors = (directions / np.sqrt(values)).astype(np.float32)
    return whiten


def clusters_of(vectors: Vectors, count: int, seed: int) -> NDArray[np.int64]:
    """(G,) the cluster of each vector of length 1, by cosine; every cluster has a member.

    Source: k-means on the sphere, Dhillon & Modha 2001; starts far apart, as in Arthur & Vassilvitskii 2007.
    """
    generator = np.random.default_rng(seed)
    centres = [vectors[int(generator.integers(len(vectors)))]]
    for _ in range(1, count):
        distances = np.maximum(0.0, 1.0 - np.max(vectors @ np.stack(centres).T, axis=1).astype(np.float64))
        if distances.sum() <= 0:
            break
        centres.append(vectors[int(generator.choice(len(vectors), p=distances / distances.sum()))])
    middle = np.stack(centres)
    for _ in range(ITERATIONS):
        clusters = np.argmax(vectors @ middle.T, axis=1)
        sums = np.stack([vectors[clusters == cluster].sum(axis=0) for cluster in range(len(middle))])
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(norms > 0, sums / np.maximum(norms, 1e-12), middle)
        if np.allclose(moved, middle, atol=1e-6):
            break
        middle = moved
    _, numbered = np.unique(np.argmax(vectors @ middle.T, axis=1), return_inverse=True)
    return numbered.astype(np.int64)
