"""What the first rows of every source become, in a moment: for `check`, and for texts to compare models on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.data.formats.detect import LANGUAGE_FORMATS
from ftcli.data.source_plan import DETECT_ROWS, Part, Plan, Problems, named_sources, plan_source

if TYPE_CHECKING:
    from ftcli.data.chunks import Row
    from ftcli.data.settings import Data
    from ftcli.data.tree import TokenTree
    from ftcli.models.tokenizer import Tokenizer

LOOK_CHARS = 2000


@dataclass(frozen=True)
class SourceLook:
    """What the first rows of a source become."""

    part: Part
    name: str
    role: str
    format: str
    """Kind of the format that reads the rows."""
    is_detected: bool
    """The recipe does not name the format."""
    num_rows: int
    """Rows looked at."""
    num_examples: int
    num_tokens: int
    num_targets: int
    dropped: dict[str, int]
    """Rows left out, by the reason."""
    unread: str | None
    """What to tell of a column that looks like the answer and is not read."""
    trees: list[TokenTree]
    wheres: list[str]
    """For each tree where its row stands."""

    def line(self) -> str:
        """The look in one line."""
        detected = ", found from its columns" if self.is_detected else ""
        ratio = self.num_targets / max(1, self.num_tokens)
        dropped = "".join(f", {count} dropped: {reason}" for reason, count in sorted(self.dropped.items()))
        rows = "1 row" if self.num_rows == 1 else f"{self.num_rows} rows"
        examples = "1 example" if self.num_examples == 1 else f"{self.num_examples} examples"
        return (
            f"{self.part} {self.name} ({self.format}{detected}): first {rows}, {examples}, "
            f"{self.num_tokens} tokens, {ratio:.0%} trained{dropped}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the trees."""
        return {name: value for name, value in vars(self).items() if name not in ("trees", "wheres")}


def look(
    data: Data, tokenizer: Tokenizer, rows_per_source: int = DETECT_ROWS, formats: frozenset[str] = LANGUAGE_FORMATS
) -> list[SourceLook]:
    """What the first rows of every source become, without cache and processes.

    Raises:
        DataError: all that is wrong with the first rows of all sources.
    """
    problems = Problems()
    looks: list[SourceLook] = []
    for source in named_sources(data, problems):
        # What the base model has yet to write cannot be looked at.
        if source.entry.source.kind == "self":
            continue
        with problems.collecting():
            looks.append(_look(plan_source(source, data, tokenizer, rows_per_source, formats), tokenizer))
    problems.raise_any()
    return looks


def _look(plan: Plan, tokenizer: Tokenizer) -> SourceLook:
    """What the rows of a plan become.

    Raises:
        DataError: something is wrong with them.
    """
    import numpy as np

    from ftcli.data.chunks import RowTokeniser, Work
    from ftcli.data.verdict import refuse

    tokeniser = RowTokeniser(Work(plan.format, tokenizer, plan.max_length, plan.policy))
    trees: list[TokenTree] = []
    wheres: list[str] = []
    for row in plan.rows():
        found = tokeniser.trees(_beginning(row) if plan.policy in ("split", "block") else row)
        trees += found
        wheres += [row[1]] * len(found)
    tally = tokeniser.tally
    # Later rows may fit where the first ones are all too long.
    may_be_empty = tally.rows_read == plan.limit and set(tally.dropped) == {"too long"}
    refuse(tally, np.array(tokeniser.row_lengths, dtype=np.int32), plan.source.name, tokeniser.work, may_be_empty=may_be_empty)
    return SourceLook(
        part=plan.source.part,
        name=plan.source.name,
        role=plan.source.entry.role,
        format=plan.format.kind,
        is_detected=plan.is_detected,
        num_rows=tally.rows_read,
        num_examples=tally.num_examples,
        num_tokens=tally.num_tokens,
        num_targets=tally.num_targets,
        dropped=dict(tally.dropped),
        unread=plan.unread(),
        trees=trees,
        wheres=wheres,
    )


def _beginning(row: Row) -> Row:
    """A row with its longest texts cut: of a book that will be split, the first pages show enough."""
    index, where, values = row
    return index, where, {name: value[:LOOK_CHARS] if isinstance(value, str) else value for name, value in values.items()}
