"""The JSON files of models and adapters: an object, or an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftcli.errors import Problem, RequestError


def read_object(path: Path, where: str = "") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        where: what the user called it; the file is named in any case.

    Raises:
        RequestError: there is no such file, or something else in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, where, (error.strerror or str(error)).lower()) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, where, f"it is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise _unreadable(path, where, f"found a {type(found).__name__}, allowed: a JSON object")
    return found


def _unreadable(path: Path, where: str, why: str) -> RequestError:
    return RequestError("a file cannot be read", [Problem(where, f"`{path}`: {why}", "fetch or write the file again")])
