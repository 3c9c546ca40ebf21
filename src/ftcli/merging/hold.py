"""One merge or export at a time for each place: an exclusive lock on a file in the folder that is worked in, held until the end.

The kernel takes the lock back when a process ends, however it ends: a merge that was killed holds nothing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ftcli.errors import UsageError
from ftcli.files import make_folder, said_when_disk_is_full

LOCK = ".lock"


@contextmanager
def held(folder: Path, output: Path) -> Iterator[None]:
    """Keep every other merge and export out of `folder`, which is made where it is missing, and goes where it is empty in the end.

    Args:
        output: the name that the folder gets when all is done; the lock goes with it, so that nobody comes in between.

    Raises:
        UsageError: another one is at work there, by its process; or no folder can be made there.
    """
    with said_when_disk_is_full(output):
        file = _locked(folder, output)
    try:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        for place in (folder, output):
            if _is_at(file, place / LOCK):
                (place / LOCK).unlink()
        file.close()
        with suppress(OSError):  # what is in it stays
            folder.rmdir()


def is_held(folder: Path) -> bool:
    """True while a merge is at work in `folder`."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # there is no lock to hold
    return False


def clear(folder: Path) -> None:
    """Remove everything in `folder` but its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _locked(folder: Path, output: Path) -> IO[str]:
    """The lock's file, locked, which is the one at its place still."""
    while True:
        make_folder(folder, output)
        try:
            file = (folder / LOCK).open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue  # the folder has just got its name
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read()
            file.close()
            who = f"process {pid}" if pid.isdecimal() else "another process"
            hint = "wait until it is done, or choose another folder with -o"
            raise UsageError(f"`{output}` is being written by {who}", hint=hint) from None
        if _is_at(file, folder / LOCK):
            return file
        file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
