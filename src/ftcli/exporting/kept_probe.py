"""probe.json of a merged model: a few rows, and what the written files made of them, so that they can be asked again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import RunError
from ftcli.files import write_text

if TYPE_CHECKING:
    from torch import Tensor

PROBE = "probe.json"
MAX_ROWS = 4
MAX_NUMBERS = 4096
"""Of a classifier's logits, all; of a language model the log-probability of each next token."""


def write_kept_logits(folder: Path, probe: list[list[int]], logits: Tensor) -> None:
    """Write the first rows of the probe and what the model made of them."""
    rows = probe[:MAX_ROWS]
    write_text(folder / PROBE, json.dumps({"token_rows": rows, "values": kept_values(rows, logits)}) + "\n")


def kept_values(rows: list[list[int]], logits: Tensor) -> list[float]:
    """What of `logits` is kept: of a language model the log-probability of each token after the first, of a classifier all.

    Args:
        logits: ``(tokens, vocabulary)`` of all rows, or of more; of a classifier ``(texts, classes)``.
    """
    found: list[float] = []
    if len(logits) < sum(map(len, rows)):
        return [float(value) for value in logits[: len(rows)].flatten()[:MAX_NUMBERS]]
    start = 0
    for row in rows:
        log_probs = logits[start : start + len(row)].double().log_softmax(-1)
        found += [float(log_probs[place, token]) for place, token in enumerate(row[1:])]
        start += len(row)
    return found


def read_kept_logits(folder: Path) -> tuple[list[list[int]], list[float]]:
    """(rows, values) as they were written.

    Raises:
        RunError: there are none, or they cannot be read.
    """
    try:
        found: Any = json.loads((folder / PROBE).read_text(encoding="utf-8"))
        return [[int(token) for token in row] for row in found["token_rows"]], [float(value) for value in found["values"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"`{PROBE}` cannot be read: {error}") from error
