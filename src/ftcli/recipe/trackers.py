"""Trackers are extras: whether their packages are installed is known before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ftcli.errors import MissingExtraError


def require_trackers(trackers: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        MissingExtraError: names the extra.
    """
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise MissingExtraError(f"trackers: `{tracker}`", tracker)
