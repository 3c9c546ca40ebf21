"""A replay buffer: a sample of bounded size of all rows that earlier runs were trained on, carried from run to run.

Every different row that was ever seen has the same chance to be in it, as in reservoir sampling (Vitter 1985, "Random sampling with a
reservoir"). Each row has a rank that is drawn from its content and the life's seed, and the rows of lowest rank are kept (bottom-k
sampling: Cohen and Kaplan 2007, "Summarizing data using bottom-k sketches"): a row that several runs have seen has one rank and counts
once, and what has to be known of all that was ever seen is one number, below which every rank is still there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from ftcli.data.formats.detect import detect_format
from ftcli.data.names import free_name
from ftcli.data.settings import TrainSource
from ftcli.errors import DataError, Problem
from ftcli.files import json_text, new_folder, write_json, write_text

BUFFER_FILE = "buffer.json"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """A source and the rows of it that a run has trained on."""

    source: TrainSource
    rows: Iterable[Row]


@dataclass(frozen=True, slots=True)
class Kept:
    """The sample of one source."""

    num_rows: int
    source: TrainSource


@dataclass(frozen=True, slots=True)
class Buffer:
    """The sample of all sources."""

    sources: tuple[Kept, ...]
    seed: int
    """Of the first run of the life."""
    complete_below: int | None
    """All rows ever seen whose rank is lower are in the sample; None where all rows are."""

    @property
    def num_rows(self) -> int:
        """Rows of the sample."""
        return sum(kept.num_rows for kept in self.sources)


@dataclass(slots=True)
class _Lowest:
    """The rows of lowest rank among all that were offered, each once."""

    size: int
    complete_below: int | None
    rows: dict[int, tuple[int, Row]] = field(default_factory=dict)
    """(number of its source, row) by rank, in the order they came."""
    _highest_first: list[int] = field(default_factory=list)

    def offer(self, rank: int, source: int, row: Row) -> None:
        if rank in self.rows or (self.complete_below is not None and rank >= self.complete_below):
            return
        self.rows[rank] = (source, row)
        heappush(self._highest_first, -rank)
        if len(self.rows) > self.size:
            self.complete_below = -heappop(self._highest_first)
            del self.rows[self.complete_below]


def fill_buffer(sources: Sequence[Seen], earlier: Buffer | None, folder: Path, size: int, seed: int, suffix: str) -> Buffer:
    """Write a fair sample of at most `size` of the rows seen of `sources` and before; the same arguments give the same rows.

    It is smaller where the buffer before has kept fewer: of rows that it has let go there is no part to take.

    Args:
        sources: what the last run was trained on, but for its own buffer.
        earlier: that buffer.
        seed: of a life that begins here.
        suffix: tells sources of several runs apart; it is put behind their names.

    Raises:
        DataError: a source cannot be read any more.
    """
    kept = () if earlier is None else earlier.sources
    seed = seed if earlier is None else earlier.seed
    lowest = _Lowest(size, None if earlier is None else earlier.complete_below)
    entries = [
        *((one.source, (row for _, row in one.source.source.rows()), "") for one in kept),
        *((one.source, one.rows, suffix) for one in sources),
    ]
    for number, (_, rows, _) in enumerate(entries):
        for row in rows:
            lowest.offer(_rank(row, seed), number, row)
    found: list[Kept] = []
    with new_folder(folder) as partial:
        for number, (source, _, behind) in enumerate(entries):
            sample = [row for of, row in lowest.rows.values() if of == number]
            if not sample:
                continue
            path = f"{number:02d}.jsonl"
            write_text(partial / path, "".join(json_text(row, default=str) + "\n" for row in sample))
            name = free_name(f"{source.name or source.source.label()}{behind}", [one.source.name or "" for one in found])
            found.append(Kept(len(sample), _as_replay(source, folder / path, sample, name)))
        buffer = Buffer(tuple(found), seed, lowest.complete_below)
        listed = [one.source.model_dump(mode="json") for one in found]
        write_json(partial / BUFFER_FILE, {"size": size, "seed": seed, "complete_below": buffer.complete_below, "sources": listed})
    return buffer


def _rank(row: Row, seed: int) -> int:
    """Below 2**64, and the same for the same row wherever it stands."""
    text = json_text(dict(sorted(row.items())), default=str)
    return int.from_bytes(hashlib.blake2b(f"{seed} {text}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


def read_buffer(folder: Path) -> Buffer | None:
    """What `fill_buffer` wrote; None where there is none.

    Raises:
        DataError: it is damaged, or another version of ftcli wrote it otherwise.
    """
    if not (folder / BUFFER_FILE).is_file():
        return None
    try:
        found = json.loads((folder / BUFFER_FILE).read_text(encoding="utf-8"))
        sources = [TrainSource.model_validate_json(json.dumps(entry)) for entry in found["sources"]]
        seed, complete_below = found["seed"], found["complete_below"]
    except (ValueError, KeyError, TypeError) as error:
        what = f"`{folder / BUFFER_FILE}` is damaged, or of another version of ftcli ({type(error).__name__}: {error})"
        raise DataError("a replay buffer cannot be read", [Problem("", what, "remove its folder: it is sampled again")]) from error
    return Buffer(tuple(Kept(sum(1 for _ in source.source.rows()), source) for source in sources), seed, complete_below)


def _as_replay(source: TrainSource, path: Path, rows: Sequence[Row], name: str) -> TrainSource:
    layout = source.format or detect_format(rows, name)
    document = {
        "source": {"kind": "file", "path": str(path.resolve())},
        "format": layout.model_dump(mode="json"),
        "name": name,
        "role": "replay",
        "loss_weight": source.loss_weight,
        "unit": source.unit,
    }
    try:
        return TrainSource.model_validate_json(json.dumps(document))
    except ValueError as error:
        raise DataError(f"`{name}` cannot be kept for replay: {error}") from error
