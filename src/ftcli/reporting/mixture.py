"""What a run has seen of each training source, as a table of the report: shares realised, and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftcli.reporting.page import Block, Table

HEADINGS = ("source", "role", "tokens", "share of tokens", "planned", "passes", "loss at first", "at last")


def mixture_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of one row for each source, as `training.realised` gives them."""
    return [
        [
            str(entry.get("name", "")),
            str(entry.get("role", "")),
            *(_number(entry.get(key), form) for key, form in (("tokens", ",d"), ("share", ".1%"), ("share_planned", ".1%"))),
            *(_number(entry.get(key), form) for key, form in (("passes", ".2f"), ("first_loss", ".3f"), ("last_loss", ".3f"))),
        ]
        for entry in entries
    ]


def mixture_blocks(manifest: Mapping[str, Any]) -> list[Block]:
    """The table; none for a run of one source, or one that has not ended."""
    entries = manifest.get("mixture")
    found = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    return [Table("What was seen of each source", HEADINGS, mixture_rows(found), numbers_from=2)] if len(found) > 1 else []


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"
