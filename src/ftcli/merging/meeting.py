"""The folder in which models meet: its rounds, what was contributed to each, and who may average."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.errors import Problem, RequestError, UsageError
from ftcli.files import PARTIAL
from ftcli.merging.documents import read_object


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one contributor made of a round's model."""

    name: str
    folder: Path
    note: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"


@dataclass(frozen=True, slots=True)
class Round:
    """One start, and what was made of it."""

    number: int
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def contributions(self) -> list[Contribution]:
        """Those that are complete, by name."""
        found = []
        for path in sorted(self.folder.glob("contributions/*")):
            note = path / "contribution.json"
            if not path.name.startswith(PARTIAL) and note.is_file():
                found.append(Contribution(path.name, path, read_object(note)))
        return found


@dataclass(frozen=True)
class Meeting:
    """A folder in which models meet."""

    folder: Path

    def rounds(self) -> list[Round]:
        """Every round that has its model, the first first.

        Raises:
            UsageError: the folder is none of these.
        """
        if not (self.folder / "cold.json").is_file():
            raise UsageError(f"`{self.folder}` is no meeting place: it has no cold.json", hint="ftcli cold init FOLDER --base BASE")
        numbered = sorted(path for path in self.folder.glob("rounds/*") if path.name.isdecimal())
        return [Round(int(path.name), path) for path in numbered if (path / "model" / "config.json").is_file()]

    @property
    def current(self) -> Round:
        """The round to contribute to.

        Raises:
            UsageError: the folder has none.
        """
        rounds = self.rounds()
        if not rounds:
            raise UsageError(f"`{self.folder}` has no round with a model", hint="begin anew with `ftcli cold init FOLDER --base BASE`")
        return rounds[-1]

    def round_at(self, number: int) -> Round:
        return Round(number, self.folder / "rounds" / f"{number:03d}")

    def info(self) -> dict[str, Any]:
        """What cold.json says.

        Raises:
            RequestError: it is damaged.
        """
        found = read_object(self.folder / "cold.json")
        if not isinstance(found.get("base"), str) or not isinstance(found.get("rounds"), list):
            what = f"`{self.folder / 'cold.json'}` has no `base` and `rounds`"
            raise RequestError("a meeting place is damaged", [Problem("", what)])
        return found

    @contextmanager
    def only_fuser(self) -> Iterator[None]:
        """Keeps every other fuse of this folder out.

        Raises:
            UsageError: one is at work.
        """
        with (self.folder / ".fuse.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is fusing in {self.folder}") from None
            yield
