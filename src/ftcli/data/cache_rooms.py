"""What the cache holds beside tokenised sources: small files and texts, each kind in a folder of its own, a room.

Everything in a room is content-addressed and made again where it is missed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WHAT = {
    "self": "replay text that bases wrote themselves",
    "audits": "audits of tokenised sources",
    "hashes": "hashes of large files",
    "tokenizers": "tokenizers that were converted or extended",
    "evaluations": "evaluations",
}
NOT_A_ROOM = "trees"
# A run that is going copies its tokenizer from there when it saves.
ONLY_BY_NAME = frozenset({"tokenizers"})
UNFINISHED = (".partial", ".tmp")
SECONDS_AT_WORK = 600.0
"""What is unfinished and was written to this lately may be another process's at work."""


@dataclass(frozen=True)
class Room:
    """One kind of what is cached, or what was removed of it."""

    name: str
    what: str
    entries: int
    num_bytes: int
    last_used: float
    """Seconds since 1970 of the last change."""


def rooms(cache_folder: Path) -> list[Room]:
    """Every room that is not empty, by name."""
    if not cache_folder.is_dir():
        return []
    found = [_room(folder, _entries(folder)) for folder in sorted(cache_folder.iterdir()) if folder.is_dir() and folder.name != NOT_A_ROOM]
    return [room for room in found if room.entries]


def clear_rooms(cache_folder: Path, names: Collection[str] = (), older_than_days: float | None = None) -> tuple[list[Room], dict[str, int]]:
    """Empty rooms.

    Args:
        names: of rooms; without any all but those that a running process may need at its end.
        older_than_days: only what was not changed for so long.

    Returns:
        (what was removed of each room, how much of a room was left because another process may be writing it).
    """
    removed, left = [], {}
    for room in rooms(cache_folder):
        if room.name not in names if names else room.name in ONLY_BY_NAME:
            continue
        folder, now = cache_folder / room.name, time.time()
        wanted = [path for path in _entries(folder) if older_than_days is None or now - _changed(path) > older_than_days * 86400]
        busy = {
            path for path in wanted if any(now - _changed(part) < SECONDS_AT_WORK for part in _parts(path) if part.suffix in UNFINISHED)
        }
        chosen = [path for path in wanted if path not in busy]
        if busy:
            left[room.name] = len(busy)
        if chosen:
            removed.append(_room(folder, chosen))
        for path in chosen:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return removed, left


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _room(folder: Path, entries: list[Path]) -> Room:
    sizes = [_size(part) for path in entries for part in _parts(path)]
    last = max(map(_changed, entries), default=0.0)
    return Room(folder.name, WHAT.get(folder.name, "other"), len(entries), sum(sizes), last)


def _parts(path: Path) -> list[Path]:
    return [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):  # another process may have replaced it since
        return path.stat().st_size
    return 0


def _changed(path: Path) -> float:
    with suppress(FileNotFoundError):
        return max((part.stat().st_mtime for part in _parts(path)), default=path.stat().st_mtime)
    return 0.0
