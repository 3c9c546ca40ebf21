"""A document of sections as Markdown: the same words as the page, its figures told by their descriptions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ftcli.reporting.page import Beside, Block, Code, Document, Figure, Folded, Items, Marked, Section, Table, Text


def markdown_text(document: Document) -> str:
    """The document as Markdown."""
    parts = [f"# {inline(document.title)}", f"**{inline(document.state)}**", *(inline(line) for line in document.lead)]
    for section in document.sections:
        parts += _section(section) if section.blocks else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> list[str]:
    return [f"## {inline(section.title)}", *(_block(block) for block in section.blocks)]


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return inline(text)
        case Table(_, headings, rows, _, marks):
            if not marks:
                return table(headings, rows)
            return table(["result", *headings], [[word, *row] for (word, _), row in zip(marks, rows, strict=True)])
        case Figure(_, alt):
            return f"_{inline(alt)}_"
        case Code(text, summary):
            return (f"{inline(summary)}:\n\n" if summary else "") + fenced(text)
        case Items(lines):
            return "\n".join(f"- {inline(line)}" for line in lines)
        case Marked(title, pieces):
            return f"{inline(title)}:\n\n{fenced(_plain(pieces))}"
        case Beside(title, lead, columns):
            told = [] if lead is None else [fenced(lead)]
            shown = [f"{inline(column.title)}:\n\n{fenced(_plain(column.pieces))}" for column in columns]
            return "\n\n".join([f"### {inline(title)}", *told, *shown])
        case Folded(summary, blocks):
            return "\n\n".join([f"### {inline(summary)}", *map(_block, blocks)])


def _plain(pieces: Sequence[tuple[str, bool]]) -> str:
    """What is marked stands between ⟦ and ⟧."""
    return "".join(f"⟦{text}⟧" if is_marked else text for text, is_marked in pieces)


def fenced(text: str) -> str:
    """`text` in a fence that it does not close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; empty without rows."""
    lines = [f"| {' | '.join(inline(cell) for cell in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}", *lines]) if lines else ""


def inline(value: object) -> str:
    """Text that stays in its cell or line, and is no markup: `<`, `|`, `*` and their like are escaped."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))
