"""Examples that stand in the training data twice, or in training and evaluation both.

Equal examples have equal digests, so digests that agree in one thing are looked at together and all others apart: they are dealt out
to buckets by their remainder, in files where there are many, and memory holds one bucket, whatever number of examples there is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ftcli.data.store import TreeStore

MAX_LISTED = 10
BUCKET_EXAMPLES = 1 << 20
MAX_BUCKETS = 128  # each holds two files open
PLACED = np.dtype([("digest", "<u8"), ("place", "<i8")])


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


def audit(train: Sequence[TreeStore], evaluation: Sequence[TreeStore], scratch: Path | None = None) -> AuditReport:
    """What repeats inside the training data, and between it and the evaluation data.

    Works on 64-bit digests: among a million examples a false alarm has odds of 3e-8.

    Args:
        scratch: folder for what does not stay in memory, 16 bytes per example from a million examples on; the system's without one.
            Nothing is left in it.
    """
    sizes = [sum(map(len, stores)) for stores in (train, evaluation)]
    num_buckets = max(1, min(MAX_BUCKETS, -(-max(sizes) // BUCKET_EXAMPLES)))
    ends = np.cumsum([len(store) for store in evaluation], dtype=np.int64)
    num_duplicates, num_overlap = 0, np.zeros(len(evaluation), dtype=np.int64)
    duplicates: list[tuple[int, int]] = []
    overlap: list[tuple[int, int]] = []
    with ExitStack() as stack:
        learnt_files, held_out_files = (_dealt_out(stores, num_buckets, scratch, stack) for stores in (train, evaluation))
        for learnt_file, held_out_file in zip(learnt_files, held_out_files, strict=True):
            learnt, held_out = _read(learnt_file), _read(held_out_file)
            # Within a bucket examples stand in the order of the data, and a stable sort leaves equal ones in it.
            learnt = learnt[np.argsort(learnt["digest"], kind="stable")]
            ranked = np.ascontiguousarray(learnt["digest"])
            repeats = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
            num_duplicates += len(repeats)
            duplicates = _first(duplicates, learnt["place"], repeats, np.searchsorted(ranked, ranked[repeats]), learnt["place"])
            found, places = _found_in(ranked, held_out["digest"])
            num_overlap += np.bincount(np.searchsorted(ends, held_out["place"][found], side="right"), minlength=len(evaluation))
            overlap = _first(overlap, held_out["place"], found, places, learnt["place"])
    return AuditReport(
        num_duplicates,
        [(_where(train, place), _where(train, other)) for place, other in duplicates],
        {store.name: int(count) for store, count in zip(evaluation, num_overlap, strict=True) if count},
        [(_where(evaluation, place), _where(train, other)) for place, other in overlap],
    )


def _dealt_out(stores: Sequence[TreeStore], num_buckets: int, scratch: Path | None, stack: ExitStack) -> list[IO[bytes]]:
    """A file for each bucket with the digests and the places of its examples, in the order of the data."""
    # All that is kept in memory is together not more than one bucket: with a single one, no file is made.
    spool = BUCKET_EXAMPLES * PLACED.itemsize // num_buckets if num_buckets > 1 else 0
    files = [stack.enter_context(_bucket_file(spool, scratch)) for _ in range(num_buckets)]
    first = 0
    for digests in (part for store in stores for part in store.digest_parts()):
        placed = np.empty(len(digests), dtype=PLACED)
        placed["digest"], placed["place"] = digests, np.arange(first, first + len(digests))
        first += len(digests)
        buckets = (digests % np.uint64(num_buckets)).astype(np.uint8)
        placed = placed[np.argsort(buckets, kind="stable")]
        ends = np.cumsum(np.bincount(buckets, minlength=num_buckets))
        for file, start, end in zip(files, [0, *ends[:-1]], ends, strict=True):
            file.write(placed[start:end].tobytes())
    return files


def _bucket_file(spool: int, scratch: Path | None) -> IO[bytes]:
    """A file without a name, in memory up to `spool` bytes, 0 for always: whatever becomes of the process, nothing is left."""
    return tempfile.SpooledTemporaryFile(spool, dir=None if scratch is None else str(scratch))


def _read(file: IO[bytes]) -> NDArray[np.void]:
    file.seek(0)
    return np.frombuffer(file.read(), dtype=PLACED)


def _first(
    listed: list[tuple[int, int]], places: NDArray[Any], chosen: NDArray[Any], others: NDArray[Any], other_places: NDArray[Any]
) -> list[tuple[int, int]]:
    """The pairs that come first in the data, of those `listed` and of the `chosen` ones: what comes first is what a reader looks at."""
    mine = places[chosen]
    first = np.argsort(mine, kind="stable")[:MAX_LISTED]
    pairs = zip(mine[first].tolist(), other_places[others[first]].tolist(), strict=True)
    return sorted([*listed, *pairs])[:MAX_LISTED]


def _found_in(ranked: NDArray[np.uint64], wanted: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of `wanted` are in the sorted `ranked`, and where the first of each of these stands."""
    places = np.searchsorted(ranked, wanted, side="left")
    inside = np.minimum(places, max(0, len(ranked) - 1))
    found = np.flatnonzero(ranked[inside] == wanted) if len(ranked) else np.zeros(0, dtype=np.int64)
    return found, inside[found]


def _where(stores: Sequence[TreeStore], place: int) -> str:
    """What to call the tree at `place` of all stores' trees in a row."""
    for store in stores:
        if place < len(store):
            return store.where(place)
        place -= len(store)
    raise IndexError(place)
