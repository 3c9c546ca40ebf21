"""Files that are whole or not there: written beside their name, synced, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftcli.errors import RunError, UsageError

PARTIAL = ".partial-"
"""Begins the name of whatever is still being written; it is never read, and removed when met."""

_MOST_NAME, _MOST_PATH = 255, 4096  # bytes, of the file systems and kernels in use


def write_text(path: Path, text: str) -> None:
    """Write a small file in one move: a reader sees the old content or the new one."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with said_when_disk_is_full(path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file line by line in one move; each line brings its own end."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with said_when_disk_is_full(path):
        with partial.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON that every program can read, in one move; NaN and infinity become null."""
    write_text(path, json_text(value, indent=2) + "\n")


def write_exact_json(path: Path, value: Any) -> None:
    """Write `value` in one move as Python's json reads it back, NaN and infinity included: state, and files of other libraries."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_text(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """`value` as JSON; null for NaN and infinity, which JSON has not.

    Args:
        default: makes of a value that JSON has not one that it has.

    Example:
        >>> json_text({"loss": float("nan"), "interval": (float("-inf"), 1.5)})
        '{"loss": null, "interval": [null, 1.5]}'
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=default)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def check_place(path: Path) -> None:
    """Refuse a path at which no file or folder can be made.

    Raises:
        UsageError: a part of it is a file, or nothing may be written there.
    """
    existing = next((place for place in path.absolute().parents if os.path.lexists(place)), Path("/"))
    if not existing.is_dir():
        raise UsageError(f"nothing can be made at `{path}`: `{existing}` is no folder", hint="choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"nothing can be made at `{path}`: nothing may be written in `{existing}`", hint="choose another place")


def check_new_folder(path: Path) -> None:
    """Refuse a path that no new folder can get, so that hours of work do not end without a name.

    Raises:
        UsageError: something is there already, or a folder that is filled beside it cannot be renamed to it.
    """
    shown = path.absolute()
    if path.resolve() == Path.cwd():
        raise UsageError(f"`{path}` is the folder we are in", hint="name a new folder")
    for part in shown.parts:
        longest = _MOST_NAME - (len(f"{PARTIAL}old-") if part == shown.name else 0)
        if len(os.fsencode(part)) > longest:
            raise UsageError(f"a name is too long: `{part[:40]}...` has {len(os.fsencode(part))} bytes, allowed: {longest}")
    if len(os.fsencode(shown)) > _MOST_PATH - 2 * _MOST_NAME:
        raise UsageError(f"a path is too long: `...{str(shown)[-40:]}` has {len(os.fsencode(shown))} bytes")
    check_place(path)
    if path.is_symlink():
        hint = "name the folder that it leads to" if path.exists() else "remove the link, which leads nowhere, or choose another name"
        raise UsageError(f"`{path}` is a link, in whose place no folder can be put", hint=hint)
    if path.is_mount():
        raise UsageError(f"`{path}` is where another disk begins, and cannot be replaced", hint="name a new folder in it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"`{path}` exists already", hint="choose another folder, or remove this one")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `path`, and replaces what was there, only once it is complete and on the disk.

    Raises:
        UsageError: no folder can be made there.
        RunError: the disk is full; what stood under `path` is untouched.
    """
    check_place(path)
    if os.path.lexists(path) and not path.is_dir():
        raise UsageError(f"no folder can be made at `{path}`: it is a file", hint="choose another place")
    partial = path.with_name(f"{PARTIAL}{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    with said_when_disk_is_full(path):
        try:
            make_folder(partial, path)
            yield partial
            sync_folder(partial)
            if path.exists():
                _replace_folder(partial, path)
            else:
                partial.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def make_folder(folder: Path, path: Path) -> None:
    """Make `folder`, in which `path` is worked at.

    Raises:
        UsageError: there can be none. Where everything may be written, some places take no folder all the same: `/proc`, a disk
            that is read only.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"no folder can be made at `{path}`: {(error.strerror or str(error)).lower()}"
        raise UsageError(what, hint="choose another place") from error


def _replace_folder(partial: Path, path: Path) -> None:
    """A folder cannot be renamed onto a full one: the old one steps aside first."""
    aside = path.with_name(f"{PARTIAL}old-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    partial.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def recover(folder: Path) -> None:
    """Tidy up after a process that was killed: an old folder whose successor did not arrive gets its name back, the rest goes."""
    for aside in folder.glob(f"{PARTIAL}old-*"):
        original = folder / aside.name.removeprefix(f"{PARTIAL}old-")
        if not original.exists():
            aside.rename(original)
    for partial in folder.glob(f"{PARTIAL}*"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until every file under `folder` is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def said_when_disk_is_full(path: Path) -> Iterator[None]:
    """Turn a full disk (or quota) into an error that says so.

    safetensors reports it as an error of its own, of which only the text tells.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_full(path) from error
    except SafetensorError as error:
        if "No space left" not in str(error):
            raise
        raise disk_full(path) from error


def disk_full(path: Path) -> RunError:
    """The error for a disk that is full while `path` is written."""
    return RunError(
        f"the disk is full: `{path.name}` could not be written to {path.parent}",
        hint="free some space and start again; `ftcli train --resume` goes on with a run",
    )


def file_hashes(folder: Path, left_out: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file under `folder` by its path in it; hidden ones, and those named in `left_out`, are passed over."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in files}
    return {
        name.as_posix(): sha256_of(path)
        for path, name in names.items()
        if name.as_posix() not in left_out and not any(part.startswith(".") for part in name.parts)
    }


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
