"""A replay buffer: a sample of bounded size of all that earlier runs were trained on, carried from run to run.

Every row that was ever seen has the same chance to be in it, as in reservoir sampling (Vitter 1985, "Random sampling with a
reservoir"): each source gives its part of the rows in proportion to what it had, drawn without replacement in one pass.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.data.formats.detect import detect_format
from ftcli.data.settings import TrainSource
from ftcli.errors import DataError
from ftcli.files import new_folder, write_json, write_text

BUFFER_FILE = "buffer.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """The sample of one source."""

    seen: int
    """Rows the sample stands for."""
    source: TrainSource

    def to_json(self) -> dict[str, Any]:
        return {"seen": self.seen, "source": self.source.model_dump(mode="json")}


def fill_buffer(sources: Sequence[TrainSource], earlier: Sequence[Kept], folder: Path, size: int, seed: int, suffix: str) -> list[Kept]:
    """Write a sample of `size` rows of `sources` and of the buffer of the runs before; the same arguments give the same rows.

    Args:
        sources: what the last run was trained on, but for its own buffer.
        earlier: that buffer.
        suffix: tells sources of several runs apart; it is put behind their names.

    Raises:
        DataError: a source cannot be read any more.
    """
    wanted = [*earlier, *(Kept(0, source) for source in sources)]
    drawn = [_draw(kept, size, random.Random(f"{seed}/buffer/{index}")) for index, kept in enumerate(wanted)]
    shares = proportional(size, [seen for seen, _ in drawn])
    found = []
    with new_folder(folder) as partial:
        for index, (kept, (seen, rows), share) in enumerate(zip(wanted, drawn, shares, strict=True)):
            name = f"{index:02d}.jsonl"
            chosen = sorted(rows[:share])
            write_text(partial / name, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for _, row in chosen))
            if chosen:
                found.append(Kept(seen, _as_replay(kept, folder / name, [row for _, row in chosen], suffix if kept.seen == 0 else "")))
        write_json(partial / BUFFER_FILE, {"size": size, "seed": seed, "sources": [kept.to_json() for kept in found]})
    return found


def read_buffer(folder: Path) -> list[Kept]:
    """What `fill_buffer` wrote; nothing where there is none."""
    if not (folder / BUFFER_FILE).is_file():
        return []
    found = json.loads((folder / BUFFER_FILE).read_text(encoding="utf-8"))
    return [Kept(entry["seen"], TrainSource.model_validate_json(json.dumps(entry["source"]))) for entry in found["sources"]]


def _draw(kept: Kept, size: int, generator: random.Random) -> tuple[int, list[tuple[int, dict[str, Any]]]]:
    """(rows seen, at most `size` of them with their numbers, any first few of which are a fair sample)."""
    reservoir: list[tuple[int, dict[str, Any]]] = []
    count = 0
    for _, row in kept.source.source.rows():
        if count == kept.source.limit:
            break
        count += 1
        place = count - 1 if count <= size else generator.randrange(count)
        if place < size:
            reservoir[place : place + 1] = [(count, row)]
    generator.shuffle(reservoir)
    return kept.seen or count, reservoir


def proportional(total: int, counts: Sequence[int]) -> list[int]:
    """`total` divided in proportion to `counts` by the largest remainders; nobody gets more than it has.

    Example:
        >>> proportional(10, [300, 100, 5]), proportional(10, [2, 3])
        ([7, 3, 0], [2, 3])
    """
    whole = sum(counts)
    if total >= whole:
        return list(counts)
    parts = [count * total // whole for count in counts]
    order = sorted(range(len(counts)), key=lambda index: (-(counts[index] * total % whole), index))
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts


def _as_replay(kept: Kept, path: Path, rows: list[dict[str, Any]], suffix: str) -> TrainSource:
    source = kept.source
    name = source.name or source.source.label()
    layout = source.format or detect_format(rows, name)
    document = {
        "source": {"kind": "file", "path": str(path.resolve())},
        "format": layout.model_dump(mode="json"),
        "name": f"{name}{suffix}",
        "role": "replay",
        "loss_weight": source.loss_weight,
        "unit": source.unit,
    }
    try:
        return TrainSource.model_validate_json(json.dumps(document))
    except ValueError as error:
        raise DataError(f"`{name}` cannot be kept for replay: {error}") from error
