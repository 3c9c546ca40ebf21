"""A replay buffer: a sample of bounded size of all rows that earlier runs were trained on, carried from run to run.

Every row that was ever seen has the same chance to be in it, as in reservoir sampling (Vitter 1985, "Random sampling with a
reservoir"). Runs come one after the other with all their rows at hand, so the sample is drawn in one go: how many of its rows are from
the buffer before is hypergeometric, and which ones is a draw without replacement.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

from ftcli.data.formats.detect import detect_format
from ftcli.data.names import free_name
from ftcli.data.settings import TrainSource
from ftcli.data.sources.file import File
from ftcli.errors import DataError
from ftcli.files import json_text, new_folder, write_json, write_text

BUFFER_FILE = "buffer.json"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """A source and the rows of it that a run has trained on."""

    source: TrainSource
    rows: Sequence[int]
    """Their numbers in the source, counted from 0, rising."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The sample of one source."""

    seen: int
    """Rows that were ever seen of it."""
    num_rows: int
    """Rows of it in the sample; a source that has none this time still counts in the next."""
    source: TrainSource

    def to_json(self) -> dict[str, Any]:
        return {"seen": self.seen, "source": self.source.model_dump(mode="json")}


def fill_buffer(sources: Sequence[Seen], earlier: Sequence[Kept], folder: Path, size: int, seed: int, suffix: str) -> list[Kept]:
    """Write a fair sample of at most `size` of the rows seen of `sources` and before; the same arguments give the same rows.

    Args:
        sources: what the last run was trained on, but for its own buffer.
        earlier: that buffer.
        suffix: tells sources of several runs apart; it is put behind their names.

    Raises:
        DataError: a source cannot be read any more.
    """
    generator = random.Random(f"{seed}/buffer")
    before, fresh = sum(kept.seen for kept in earlier), sum(len(seen.rows) for seen in sources)
    places = generator.sample(range(before + fresh), fair_size(size, earlier, fresh))
    drawn = sorted(place - before for place in places if place >= before)
    of_sample = sum(kept.num_rows for kept in earlier)
    old = sorted(generator.sample(range(of_sample), len(places) - len(drawn)))
    found: list[Kept] = []
    entries: list[tuple[Kept | Seen, list[Row]]] = [*_chosen_again(earlier, old), *_chosen(sources, drawn)]
    with new_folder(folder) as partial:
        for index, (entry, rows) in enumerate(entries):
            path = f"{index:02d}.jsonl"
            if rows:
                write_text(partial / path, "".join(json_text(row, default=str) + "\n" for row in rows))
            seen, behind = (entry.seen, "") if isinstance(entry, Kept) else (len(entry.rows), suffix)
            name = free_name(f"{entry.source.name or entry.source.source.label()}{behind}", [kept.source.name or "" for kept in found])
            found.append(Kept(seen, len(rows), _as_replay(entry.source, folder / path, rows, name)))
        write_json(partial / BUFFER_FILE, {"size": size, "seed": seed, "sources": [kept.to_json() for kept in found]})
    return found


def fair_size(size: int, earlier: Sequence[Kept], fresh: int) -> int:
    """The largest sample of at most `size` rows that the buffer before and `fresh` more rows have.

    A sample stands for more rows than it has: of a larger sample than itself it could not give its part.

    Example:
        >>> source = TrainSource(source=File(path="a.jsonl"))
        >>> [fair_size(50, [Kept(seen, 20, source)], 100) for seen in (20, 300)]
        [50, 20]
    """
    seen, num_rows = sum(kept.seen for kept in earlier), sum(kept.num_rows for kept in earlier)
    return min(size, seen + fresh) if num_rows == seen else min(size, num_rows)


def read_buffer(folder: Path) -> list[Kept]:
    """What `fill_buffer` wrote; nothing where there is none."""
    if not (folder / BUFFER_FILE).is_file():
        return []
    entries = json.loads((folder / BUFFER_FILE).read_text(encoding="utf-8"))["sources"]
    sources = [TrainSource.model_validate_json(json.dumps(entry["source"])) for entry in entries]
    return [Kept(entry["seen"], _num_rows(source), source) for entry, source in zip(entries, sources, strict=True)]


def _num_rows(source: TrainSource) -> int:
    """Rows of a source of a buffer; one that gave none has no file."""
    assert isinstance(source.source, File)
    return sum(1 for _ in source.source.rows()) if Path(source.source.path).is_file() else 0


def _chosen(sources: Sequence[Seen], drawn: Sequence[int]) -> Iterator[tuple[Seen, list[Row]]]:
    """Each source with its rows among those `drawn` of all seen, which are numbered through."""
    for seen, numbers in zip(sources, _parts([len(seen.rows) for seen in sources], drawn), strict=True):
        yield seen, _read(seen.source, [seen.rows[number] for number in numbers])


def _chosen_again(earlier: Sequence[Kept], drawn: Sequence[int]) -> Iterator[tuple[Kept, list[Row]]]:
    for kept, numbers in zip(earlier, _parts([kept.num_rows for kept in earlier], drawn), strict=True):
        yield kept, _read(kept.source, numbers)


def _parts(counts: Sequence[int], drawn: Sequence[int]) -> list[list[int]]:
    """Numbers of rows that run through all sources, as numbers in each source.

    Example:
        >>> _parts([3, 2], [0, 2, 4])
        [[0, 2], [1]]
    """
    return [[number - first for number in drawn if first <= number < end] for first, end in pairwise(accumulate(counts, initial=0))]


def _read(source: TrainSource, numbers: Sequence[int]) -> list[Row]:
    wanted = set(numbers)
    rows = islice(source.source.rows(), max(wanted) + 1) if wanted else ()
    return [row for index, (_, row) in enumerate(rows) if index in wanted]


def _as_replay(source: TrainSource, path: Path, rows: list[Row], name: str) -> TrainSource:
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
