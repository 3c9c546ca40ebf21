"""How the rows of every source of the recipe's `data` are read: its name, its format, its policy. What is wrong is told all at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ftcli.data.names import free_name
from ftcli.errors import DataError, Problem

if TYPE_CHECKING:
    from ftcli.data.chunks import Row
    from ftcli.data.formats import Format
    from ftcli.data.overflow import Policy
    from ftcli.data.settings import Data, EvaluationSource, OnOverflow, TrainSource
    from ftcli.models.tokenizer import Tokenizer

Part = Literal["train", "evaluation"]
DETECT_ROWS = 64


class Problems:
    """Collects what is wrong with several sources, to tell it all at once."""

    def __init__(self) -> None:
        self._errors: list[DataError] = []

    @property
    def are_found(self) -> bool:
        return bool(self._errors)

    def add(self, problem: Problem) -> None:
        self._errors.append(DataError("", [problem]))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Data errors inside are kept for later."""
        try:
            yield
        except DataError as error:
            self._errors.append(error)

    def raise_any(self) -> None:
        if len(self._errors) == 1 and self._errors[0].summary:
            raise self._errors[0]
        problems: list[Problem] = []
        for error in self._errors:
            if error.hint is not None or not error.problems:
                problems.append(Problem("", error.summary, error.hint))
            problems += error.problems
        if problems:
            raise DataError(f"the data has {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems)


@dataclass(frozen=True)
class Source:
    """A source of the recipe with the name that logs and metrics call it."""

    part: Part
    entry: TrainSource | EvaluationSource
    name: str


def named_sources(data: Data, problems: Problems) -> list[Source]:
    """Every source with a name that no other of its part has; a name given twice is a problem."""
    result = []
    parts: tuple[tuple[Part, Sequence[TrainSource | EvaluationSource]], ...] = (("train", data.train), ("evaluation", data.evaluation))
    for part, entries in parts:
        given = [entry.name for entry in entries if entry.name is not None]
        for index, entry in enumerate(entries):
            if entry.name is not None and entry.name in [other.name for other in entries[:index]]:
                problems.add(
                    Problem(f"data.{part}.{index}.name", f"`{entry.name}` is the name of another source", "give each its own name")
                )
        taken = set(given)
        for entry in entries:
            name = entry.name if entry.name is not None else free_name(entry.source.label(), taken)
            taken.add(name)
            result.append(Source(part, entry, name))
    return result


@dataclass(frozen=True)
class Plan:
    """How the rows of a source become trees."""

    source: Source
    format: Format
    is_detected: bool
    max_length: int
    """Tokens of its longest example."""
    policy: Policy
    limit: int | None
    """Only the first so many rows."""
    columns: tuple[str, ...]
    """Of the first row."""

    def notes(self) -> list[str]:
        """What was decided that the recipe does not say."""
        notes = [f"format of `{self.source.name}` is `{self.format.kind}`, found from its columns"] if self.is_detected else []
        unread = self.unread()
        return notes if unread is None else [*notes, f"`{self.source.name}` {unread}"]

    def unread(self) -> str | None:
        """What to tell of a column that looks like the answer and is not read."""
        from ftcli.data.formats.detect import unread_answer

        return unread_answer(self.format, self.columns)

    def rows(self) -> Iterator[Row]:
        """(index, where, row) of the rows to take."""
        for index, (where, row) in enumerate(itertools.islice(self.source.entry.source.rows(), self.limit)):
            yield index, where, row


def plan_source(source: Source, data: Data, tokenizer: Tokenizer, first_rows: int | None, formats: frozenset[str]) -> Plan:
    """The format and the policy of a source; its first row is tried, so that what stops every row stops here.

    Raises:
        DataError: no format reads it, the objective cannot learn from its format, or it has no rows.
        RequestError: the tokenizer cannot do what the format needs.
    """
    entry = source.entry
    settings = entry.format or format_of(entry, formats)
    if settings.kind not in formats:
        what = f"format `{settings.kind}` is not one that the objective learns from ({', '.join(sorted(formats))})"
        hint = "set `objective: {kind: classification}`" if settings.kind == "label" else None
        raise DataError(f"`{source.name}` cannot be used", [Problem(source.name, what, hint)])
    limits = [limit for limit in (entry.limit, first_rows) if limit is not None]
    where, row = next(entry.source.rows(), ("", None))
    if row is None:
        raise DataError(f"`{source.name}` cannot be used", [Problem(source.name, "has no rows")])
    # A wrong row is counted with all others later.
    with contextlib.suppress(DataError):
        settings.example(row, tokenizer, where)
    max_length, on_overflow = (getattr(entry, key, None) or getattr(data, key) for key in ("max_length", "on_overflow"))
    policy = _policy(source, on_overflow, settings)
    return Plan(source, settings, entry.format is None, max_length, policy, min(limits, default=None), tuple(row))


def format_of(entry: TrainSource | EvaluationSource, formats: frozenset[str]) -> Format:
    from ftcli.data.formats.detect import detect_format

    return detect_format([row for _, row in itertools.islice(entry.source.rows(), DETECT_ROWS)], entry.source.label(), formats)


def _policy(source: Source, on_overflow: OnOverflow, settings: Format) -> Policy:
    """What happens to rows that are too long.

    Raises:
        DataError: blocks are asked for of what cannot be cut.
    """
    if getattr(source.entry, "unit", "row") == "block":
        if settings.kind != "text" or on_overflow not in ("auto", "split"):
            found = f"format `{settings.kind}`" if settings.kind != "text" else f"`data.on_overflow: {on_overflow}`"
            problem = Problem(source.name, f"`unit: block` cuts texts where blocks end, found {found}", "leave out `unit`, or the other")
            raise DataError(f"`{source.name}` cannot be used", [problem])
        return "block"
    if on_overflow == "auto":
        return "split" if settings.kind == "text" else "error"
    return on_overflow
