"""Words out, the same way in every command: people read stderr, programs read stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """The rich console of this process: writes to stderr, plain where NO_COLOR is set or stderr is no terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(report: Any) -> None:
    """Writes `report` to stdout as JSON; NaN and infinity, which JSON has not, become null."""
    from ftcli.files import json_text

    print(json_text(report, indent=2, default=str), flush=True)


@contextmanager
def words_on_stderr(asked: bool) -> Iterator[None]:
    """With `asked`, whatever is printed inside goes to stderr, by libraries, too: stdout is for the report alone."""
    with redirect_stdout(sys.stderr) if asked else nullcontext():
        yield


def print_error(message: str) -> None:
    """Writes `error: message` to stderr, `error:` in red on a terminal that has colours."""
    stream = sys.stderr
    coloured = stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    prefix = "\033[1;31merror:\033[0m" if coloured else "error:"
    stream.write(f"{prefix} {message}\n")
    stream.flush()


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all.

    Raises:
        UsageError: the folder is not there or cannot be written to.
    """
    from ftcli.errors import UsageError

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"`{path}` cannot be written: {(error.strerror or str(error)).lower()}") from None
