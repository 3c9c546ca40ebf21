"""Hashes of large files that have not changed since they were hashed: reading a corpus again only to know it takes longer than a run."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from ftcli.units import MIB

MIN_BYTES = 16 * MIB  # what is smaller is read sooner than it is looked up twice
SETTLED_SECONDS = 2.0  # a file that changed this lately may change again within the grain of its time stamp


def sha256_of_file(path: Path, cache_folder: Path) -> str:
    """sha256 of a file's bytes; a large one is told by its path, size, time and inode if it was read before.

    A cache that cannot be written is done without.
    """
    status = path.stat()
    if status.st_size < MIN_BYTES:
        return _read(path)
    name = str(path.resolve())
    known = [name, status.st_size, status.st_mtime_ns, status.st_ino]
    note = cache_folder / "hashes" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["file"] == known:
            return str(kept["sha256"])
    digest = _read(path)
    if time.time() - status.st_mtime > SETTLED_SECONDS:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            partial = note.with_suffix(f".{os.getpid()}.tmp")
            partial.write_text(json.dumps({"file": known, "sha256": digest}), encoding="utf-8")
            partial.replace(note)
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
