"""A document of sections as one HTML page that fetches nothing: readable on a phone, in light and dark, and by a screen reader.

Whatever comes from data or a recipe is escaped here, once, for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

Tone = Literal["good", "bad", "soft"]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str
    is_soft: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings; `marks` puts a word with a tone in front of each row."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers_from: int = 99
    """Columns from this one on hold numbers."""
    marks: Sequence[tuple[str, Tone]] = ()
    is_narrow: bool = False
    """On a phone names in the first column are broken, and numbers wrap, rather than that it scrolls."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing, and what it shows in words for whoever cannot see it."""

    svg: str
    alt: str
    is_small: bool = False
    """Two small ones stand beside each other where there is room."""


@dataclass(frozen=True, slots=True)
class Code:
    """Text as it is."""

    text: str
    summary: str | None = None
    """Folded away under this line."""


@dataclass(frozen=True, slots=True)
class Items:
    """A list of lines."""

    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Marked:
    """A text in pieces, some of them marked."""

    title: str
    pieces: Sequence[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class Beside:
    """Texts beside each other, under what they belong to."""

    title: str
    lead: str | None
    columns: Sequence[Marked]


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks that are folded away."""

    summary: str
    blocks: Sequence[Block]


Block = Text | Table | Figure | Code | Items | Marked | Beside | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks under a title; a section without blocks is left out."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Document:
    """What a report says, whatever it is written as."""

    title: str
    state: str
    tone: Tone
    lead: Sequence[str]
    sections: Sequence[Section]


STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff; --panel: #f6f8fa;
  --good: #1a7f37; --bad: #cf222e; --mark: #0a5fa8; --hit: #fff1b8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9fa8b2; --line: #3d444d; --paper: #0d1117;
  --panel: #151b23; --good: #3fb950; --bad: #ff6a61; --mark: #6cb6ff; --hit: #5a4a00; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .35rem 0; overflow-wrap: anywhere; }
p.lead { font-size: 1.08rem; }
.soft { color: var(--soft); }
.state { display: inline-block; font-size: .8rem; font-weight: 600; padding: .1rem .6rem; border-radius: 1rem; border: 1px solid;
  vertical-align: middle; }
.good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; background: linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 2rem 100%
  no-repeat local, linear-gradient(to left, var(--line), transparent) 100% 0 / .8rem 100% no-repeat scroll; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .2rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; min-width: 3.5rem; }
thead th { color: var(--soft); font-weight: 600; font-size: .85rem; vertical-align: bottom; }
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
pre, code { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; margin: .3rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--hit); color: inherit; text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: 2px; }
details > summary { cursor: pointer; color: var(--mark); }
figure { margin: .5rem 0 1rem; max-width: 46rem; }
svg { width: 100%; height: auto; display: block; }
.beside { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .9rem .8rem; margin: .75rem 0; }
.beside h3, .beside h4 { color: var(--soft); font-size: .82rem; margin: .5rem 0 .1rem; font-weight: 600; }
li { margin: .2rem 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) { table { font-size: .8rem; } th, td { padding-right: .45rem; min-width: 0; }
  thead th, caption { font-size: .76rem; } th:last-child, td:last-child { padding-right: 0; }
  thead th.number { white-space: normal; }
  .narrow td.number { white-space: normal; } .narrow tbody th { overflow-wrap: anywhere; min-width: 4.5rem; } }
@media (min-width: 46rem) {
  .columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; }
  .figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem 1.5rem; }
}
@media print { .scroll { overflow: visible; } }
"""


def html_page(document: Document) -> str:
    """The document as one page."""
    sections = "\n".join(_section(section) for section in document.sections if section.blocks)
    lead = "\n".join(f'<p class="lead">{escape(line)}</p>' for line in document.lead)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(document.title)} - ftcli</title>
<style>{STYLE}</style>
</head>
<body><main>
<h1>{escape(document.title)} <span class="state {document.tone}">{escape(document.state)}</span></h1>
{lead}
{sections}
</main></body>
</html>
"""


def _section(section: Section) -> str:
    parts, small = [], [block for block in section.blocks if isinstance(block, Figure) and block.is_small]
    for block in section.blocks:
        if isinstance(block, Figure) and block.is_small:
            # They stand together where the first of them stands.
            parts.append(f'<div class="figures">{"".join(map(_block, small))}</div>' if block is small[0] else "")
        else:
            parts.append(_block(block))
    return f"<section><h2>{escape(section.title)}</h2>\n{''.join(parts)}</section>"


def _block(block: Block) -> str:
    match block:
        case Text(text, is_soft):
            return f'<p class="soft">{escape(text)}</p>' if is_soft else f"<p>{escape(text)}</p>"
        case Table():
            return _table(block)
        case Figure(svg, alt):
            label = f'<svg role="img" aria-label="{escape(alt, quote=True)}"'
            return f"<figure>{svg.replace('<svg', label, 1)}</figure>"
        case Code(text, None):
            return f"<pre>{escape(text)}</pre>"
        case Code(text, summary):
            return f"<details><summary>{escape(summary or '')}</summary><pre>{escape(text)}</pre></details>"
        case Items(lines):
            return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
        case Marked(title, pieces):
            return f"<h3>{escape(title)}</h3>{_marked(pieces)}"
        case Beside(title, lead, columns):
            shown = "".join(f"<div><h4>{escape(column.title)}</h4>{_marked(column.pieces)}</div>" for column in columns)
            told = "" if lead is None else f"<pre>{escape(lead)}</pre>"
            return f'<div class="beside"><h3>{escape(title)}</h3>{told}<div class="columns">{shown}</div></div>'
        case Folded(summary, blocks):
            return f"<details><summary>{escape(summary)}</summary>{''.join(map(_block, blocks))}</details>"


def _marked(pieces: Sequence[tuple[str, bool]]) -> str:
    inner = "".join(f"<mark>{escape(text)}</mark>" if is_marked else escape(text) for text, is_marked in pieces)
    return f"<pre>{inner or ' '}</pre>"


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    first = ['<th scope="col">result</th>'] if table.marks else []
    head = first + [
        f'<th scope="col"{_number_class(index, table.numbers_from)}>{escape(text)}</th>' for index, text in enumerate(table.headings)
    ]
    body = []
    for place, row in enumerate(table.rows):
        cells = []
        if table.marks:
            word, tone = table.marks[place]
            cells.append(f'<td class="{tone}">{escape(word)}</td>')
        for index, text in enumerate(row):
            tag = 'th scope="row"' if index == 0 else f"td{_number_class(index, table.numbers_from)}"
            cells.append(f"<{tag}>{escape(text)}</{tag.split()[0]}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    label = escape(table.caption, quote=True)
    header = f"<thead><tr>{''.join(head)}</tr></thead>" if any(table.headings) else ""
    kind = ' class="narrow"' if table.is_narrow else ""
    inner = f"<table{kind}><caption>{label}</caption>{header}<tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{inner}</div>'


def _number_class(index: int, numbers_from: int) -> str:
    return ' class="number"' if index >= numbers_from else ""
