"""Examples that stand in the training data twice, or in training and evaluation both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ftcli.data.store import TreeStore

MAX_LISTED = 10


@dataclass(frozen=True)
class AuditReport:
    """Equal examples: the same tokens in the same branches, whatever is trained of them."""

    num_duplicates: int
    """Training examples that repeat an earlier one."""
    duplicates: list[tuple[str, str]]
    """The first of them: (the repeated example, the earlier one)."""
    num_overlap: dict[str, int]
    """By evaluation source: its examples that are trained on, too; sources without any are not there."""
    overlap: list[tuple[str, str]]
    """The first of them: (evaluation example, training example)."""

    def lines(self) -> list[str]:
        """One line for each thing that is not as it should be; none if all is well."""
        lines = []
        if self.num_duplicates:
            repeat = "example repeats" if self.num_duplicates == 1 else "examples repeat"
            lines.append(f"{self.num_duplicates} training {repeat} an earlier one, such as {' = '.join(self.duplicates[0])}")
        for name, count in self.num_overlap.items():
            examples, are = ("example", "is") if count == 1 else ("examples", "are")
            found = f"{count} {examples} of evaluation source `{name}` {are} trained on, too"
            lines.append(f"{found}: its figures will look better than they are")
        return lines

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def audit(train: Sequence[TreeStore], evaluation: Sequence[TreeStore]) -> AuditReport:
    """What repeats inside the training data, and between it and the evaluation data.

    Works on 64-bit digests: memory is some 30 bytes per example, and among a million examples a false alarm has odds of 3e-8.
    """
    digests = np.concatenate([store.digests for store in train]) if train else np.zeros(0, dtype=np.uint64)
    order = np.argsort(digests, kind="stable")
    ranked = digests[order]
    repeats = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
    first = order[np.searchsorted(ranked, ranked[repeats], side="left")]
    # Listed in the order of the data: what comes first is what a reader looks at.
    listed = np.argsort(order[repeats], kind="stable")[:MAX_LISTED]
    duplicates = [(_where(train, int(order[repeats[at]])), _where(train, int(first[at]))) for at in listed]
    num_overlap: dict[str, int] = {}
    overlap: list[tuple[str, str]] = []
    for store in evaluation:
        found, places = _found_in(ranked, store.digests)
        if found.any():
            num_overlap[store.name] = int(found.sum())
            for index in np.flatnonzero(found)[: MAX_LISTED - len(overlap)]:
                overlap.append((store.where(int(index)), _where(train, int(order[places[index]]))))
    return AuditReport(len(repeats), duplicates, num_overlap, overlap)


def _found_in(ranked: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of `wanted` are in the sorted `ranked`, and where the first of each stands."""
    places = np.searchsorted(ranked, wanted, side="left")
    inside = np.minimum(places, max(0, len(ranked) - 1))
    found = ranked[inside] == wanted if len(ranked) else np.zeros(len(wanted), dtype=bool)
    return found, inside


def _where(stores: Sequence[TreeStore], place: int) -> str:
    """What to call the tree at `place` of all stores' trees in a row."""
    for store in stores:
        if place < len(store):
            return store.where(place)
        place -= len(store)
    raise IndexError(place)
