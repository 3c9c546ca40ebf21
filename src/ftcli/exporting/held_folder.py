"""The folder of an export: one process at a time fills it, and what stands at its name in the end is not replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftcli.files import check_new_folder, new_folder
from ftcli.merging.engine import working_folder
from ftcli.merging.hold import held


@contextmanager
def new_held_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, as `new_folder` gives it; no other export or merge fills one for `output` meanwhile.

    Raises:
        UsageError: another process is at work there, or something is there already, or has come to be there meanwhile.
    """
    with held(working_folder(output), output):
        check_new_folder(output)  # another may have ended while this one began
        with new_folder(output) as partial:
            yield partial
            check_new_folder(output)
