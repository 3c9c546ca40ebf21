"""What came of a proof that was replayed, and the replay that needs nothing but bytes: the hashes of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ftcli.files import sha256_of

Outcome = Literal["holds", "fails", "not replayed"]
LOADED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".bin", ".py", ".model", ".gguf"})
"""Of files that a loader may read; others that have been put beside an artefact change nothing."""
UNHASHED = frozenset({"manifest.json", "README.md"})


@dataclass(frozen=True, slots=True)
class Replay:
    """One proof, asked again."""

    name: str
    outcome: Outcome
    detail: str

    def line(self) -> str:
        """One line for people."""
        word = {"holds": "holds", "fails": "FAILS", "not replayed": "not replayed"}[self.outcome]
        return f"{word}: {self.name}: {self.detail}"

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def judged(name: str, holds: bool, detail: str) -> Replay:
    """A replay that came to an end."""
    return Replay(name, "holds" if holds else "fails", detail)


def skipped(name: str, why: str) -> Replay:
    """A replay that could not be made, which is no proof of anything."""
    return Replay(name, "not replayed", why)


def replay_files(folder: Path, recorded: object, artefact: str | None) -> list[Replay]:
    """Every file the manifest names is there, bit for bit; a failing one is named alone.

    Args:
        recorded: path in `folder` -> SHA-256, as the manifest has it.
        artefact: the part of `folder` that holds what was made, where a file too many counts; None for all of it.
    """
    if not isinstance(recorded, Mapping) or not recorded:
        return [skipped("files", "the manifest has no hashes of files: an older ftcli wrote it")]
    failures = []
    for name, digest in recorded.items():
        what = _fault(folder / name, str(digest))
        failures += [] if what is None else [Replay(f"file {name}", "fails", what)]
    failures += [
        Replay(f"file {name}", "fails", "was not there when the manifest was written") for name in _added(folder, recorded, artefact)
    ]
    if failures:
        return failures
    return [Replay("files", "holds", f"{len(recorded)} files are bit for bit what was written")]


def _fault(path: Path, digest: str) -> str | None:
    if not path.is_file():
        return "is gone"
    try:
        found = sha256_of(path)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None if found == digest else f"has changed: SHA-256 {found[:12]}..., and {digest[:12]}... was written"


def _added(folder: Path, recorded: Mapping[str, Any], artefact: str | None) -> list[str]:
    """Files beside the recorded ones that a loader might read."""
    place = folder if artefact is None else folder / artefact
    found = [path.relative_to(folder).as_posix() for path in sorted(place.rglob("*")) if path.is_file()]
    return [name for name in found if name not in recorded and Path(name).suffix in LOADED_SUFFIXES and Path(name).name not in UNHASHED]
