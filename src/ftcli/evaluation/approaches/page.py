"""A comparison for people: a table for the terminal, and a document that is written as a page and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from ftcli.evaluation.approaches.verdict import p_text
from ftcli.reporting.page import Beside, Block, Document, Figure, Folded, Items, Marked, Section, Table, Text, Tone
from ftcli.units import format_bytes, format_count, format_seconds

Outcome = Mapping[str, Any]

HEADINGS = ("approach", "what it is", "quality", "against the first", "tokens", "a request", "training", "to keep")


def table_of(outcome: Outcome) -> list[tuple[str, ...]]:
    """The headings and a row of cells for each approach."""
    figure = outcome["figure"]
    head = [*HEADINGS]
    head[2] = figure.replace("_", " ")
    return [tuple(head), *(_cells(one, figure) for one in outcome["approaches"])]


def _cells(one: Mapping[str, Any], figure: str) -> tuple[str, ...]:
    value = one["figures"][figure]
    against, seconds = one["against_first"], one["seconds_a_request"]
    tokens = f"{one['prompt_tokens']:.0f}"
    return (
        one["name"],
        one["what"],
        interval_text(value),
        "-" if against is None else f"{against['difference']['value']:+.3g} (p {p_text(against['adjusted_p'])})",
        f"{tokens} + {one['answer_tokens']:.0f}" if one["answer_tokens"] else tokens,
        "-" if seconds is None else milliseconds(seconds),
        training_text(one["training"]),
        format_bytes(one["extra_bytes"]) if one["extra_bytes"] else "-",
    )


def interval_text(value: Mapping[str, Any]) -> str:
    """
    Example:
        >>> interval_text({"value": 0.5, "low": 0.25, "high": 0.7501})
        '0.5 (0.25 to 0.75)'
    """
    return f"{value['value']:.3g} ({value['low']:.3g} to {value['high']:.3g})"


def milliseconds(seconds: float) -> str:
    """
    Example:
        >>> milliseconds(0.0123), milliseconds(2.5)
        ('12 ms', '2.5 s')
    """
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def training_text(training: Mapping[str, Any] | None) -> str:
    if training is None:
        return "-"
    return f"{format_seconds(training['seconds'])}, {training['steps']} steps, {format_count(training['tokens'])} tokens"


def terminal_lines(outcome: Outcome) -> list[str]:
    """The verdict, and the table with its columns aligned; what an approach is goes on a line of its own."""
    rows = [(row[0], *row[2:]) for row in table_of(outcome)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{outcome['task']} on {outcome['base']}, {outcome['rows']} rows, 95 % intervals", ""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "when facts change:"]
    width = widths[0]
    lines += [f"  {one['name']:<{width}}  {one['when_facts_change']}{_changed_text(one)}" for one in outcome["approaches"]]
    for change in outcome["retained"]:
        lines.append(f"  {_retained_text(change)}")
    return [*lines, "", *outcome["verdict"]["sentences"]]


def _changed_text(one: Mapping[str, Any]) -> str:
    return "" if one["changed"] is None else f"; measured then: {interval_text(one['changed'])}"


def _retained_text(change: Mapping[str, Any]) -> str:
    chance = "" if change["p_value"] is None else f", p {p_text(change['p_value'])}"
    before, after = change["before"]["value"], change["after"]["value"]
    return f"{change['approach']} on {change['task']} (retained): {change['figure']} {before:.4g} to {after:.4g}{chance}"


def document(outcome: Outcome) -> Document:
    """The comparison as a document, verdict first."""
    sections = (
        Section("Quality", [Figure(quality_svg(outcome), _quality_in_words(outcome))]),
        Section("Side by side", [_side_by_side(outcome)]),
        Section("When facts change", [_facts(outcome)]),
        Section("What was to be kept", _retained(outcome)),
        Section("Ways to ask", _variants(outcome)),
        Section("Compared row by row", _pairs(outcome)),
        Section("Answers", [_sample(sample) for sample in outcome["samples"]]),
        Section("How to read this", [Items(_READING)]),
    )
    asked = f"{outcome['task']} on {outcome['base']}, {outcome['rows']} rows, {outcome['precision']}"
    state, tone = _STATES[outcome["verdict"]["finding"]]
    return Document(f"{outcome['name']}: which approach?", state, tone, [*outcome["verdict"]["sentences"], asked], sections)


_STATES: dict[str, tuple[str, Tone]] = {
    "form": ("form was missing", "good"),
    "facts": ("facts were missing", "good"),
    "both": ("form and facts were missing", "good"),
    "neither": ("nothing is shown to help", "soft"),
    "open": ("not told", "soft"),
}
_READING = (
    "Form is how to answer, and training rows teach it; facts are what to answer with, and stand in documents.",
    "Intervals are of 95 %; comparisons are of the same rows, p is Holm's over all of them.",
    "Tokens are those of a request: prompt and answer, on average. Its time is the median of single requests, one by one, on this machine.",
    "What is not shown on so many rows may still be there; what would have shown in four of five tries stands beside each pair.",
    "Of several approaches of a kind the best on these rows stands for it, which favours each kind a little.",
)


def quality_svg(outcome: Outcome) -> str:
    """The figure of every approach as a bar from nothing to its value, with its interval as a line."""
    values = [one["figures"][outcome["figure"]] for one in outcome["approaches"]]
    low, high = min(0.0, *(value["low"] for value in values)), max(value["high"] for value in values)
    high = 1.0 if 0.25 < high <= 1 else high
    width, row = 540, 52
    scale = (width - 8) / ((high - low) or 1.0)
    parts = []
    for place, (one, value) in enumerate(zip(outcome["approaches"], values, strict=True)):
        top = place * row
        start, end, middle, zero = (4 + scale * (number - low) for number in (value["low"], value["high"], value["value"], 0.0))
        parts.append(
            f'<text x="4" y="{top + 18}" font-weight="600">{escape(one["name"])}</text>'
            f'<text x="{width - 4}" y="{top + 18}" text-anchor="end">{escape(interval_text(value))}</text>'
            f'<rect x="4" y="{top + 26}" width="{width - 8}" height="14" fill="currentColor" opacity=".08"/>'
            f'<rect x="{min(zero, middle):.1f}" y="{top + 26}" width="{abs(middle - zero):.1f}" height="14" fill="#0072b2"/>'
            f'<path d="M{start:.1f} {top + 33}H{end:.1f}M{start:.1f} {top + 28}v10M{end:.1f} {top + 28}v10" stroke="currentColor" '
            'stroke-width="2" fill="none"/>'
        )
    height = row * len(values) + 22
    ends = f'<text x="4" y="{height - 6}">{low:.3g}</text><text x="{width - 4}" y="{height - 6}" text-anchor="end">{high:.3g}</text>'
    better = f"{outcome['figure'].replace('_', ' ')}, {'more' if outcome['higher_is_better'] else 'less'} is better"
    middle_text = f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">{escape(better)}</text>'
    scale_line = f'<g opacity=".75">{ends}{middle_text}</g>'
    return f'<svg viewBox="0 0 {width} {height}" font-size="15" fill="currentColor">{"".join(parts)}{scale_line}</svg>'


def _quality_in_words(outcome: Outcome) -> str:
    shown = [f"{one['name']} {interval_text(one['figures'][outcome['figure']])}" for one in outcome["approaches"]]
    return f"{outcome['figure'].replace('_', ' ')}: {'; '.join(shown)}"


def _side_by_side(outcome: Outcome) -> Table:
    head, *rows = table_of(outcome)
    return Table("what each costs and brings", head, rows)


def _facts(outcome: Outcome) -> Table:
    measured = any(one["changed"] is not None for one in outcome["approaches"])
    head = ["approach", "what it needs", *(["measured without it"] if measured else [])]
    rows = [
        [one["name"], one["when_facts_change"], *([interval_text(one["changed"]) if one["changed"] else "-"] if measured else [])]
        for one in outcome["approaches"]
    ]
    return Table("what has to be done when facts change", head, rows)


def _retained(outcome: Outcome) -> list[Block]:
    rows = [
        [
            change["approach"],
            change["task"],
            change["figure"].replace("_", " "),
            f"{change['before']['value']:.4g}",
            f"{change['after']['value']:.4g}",
            "-" if change["p_value"] is None else p_text(change["p_value"]),
        ]
        for change in outcome["retained"]
    ]
    head = ["approach", "task", "figure", "before", "after", "p"]
    return [Table("retained tasks before and after training", head, rows, numbers_from=3)] if rows else []


def _variants(outcome: Outcome) -> list[Block]:
    blocks: list[Block] = []
    for one in outcome["approaches"]:
        found = one["variants"]
        if found is None:
            continue
        said = f"{one['name']}: {found['chosen']} was chosen on {found['validation_rows']} rows that are not among those measured."
        rows = [[row["name"], interval_text(row), "-" if row["p_value"] is None else p_text(row["p_value"])] for row in found["table"]]
        head = ["way to ask", f"{found['figure']} on those rows", "p against the chosen"]
        blocks += [Text(said), Table(f"ways to ask of {one['name']}", head, rows)]
    return blocks


def _pairs(outcome: Outcome) -> list[Block]:
    rows = [
        [
            f"{pair['first']} against {pair['second']}",
            f"{pair['difference']['value']:+.3g} ({pair['difference']['low']:+.3g} to {pair['difference']['high']:+.3g})",
            p_text(pair["adjusted_p"]),
            str(pair["only_a"]),
            str(pair["only_b"]),
            "not known" if pair["minimum_detectable"] is None else f"{pair['minimum_detectable']:.2g}",
        ]
        for pair in outcome["pairs"]
    ]
    head = ["pair", "difference", "p after Holm", "rows better", "rows worse", "detectable from"]
    table = Table("the same rows, answered by two approaches", head, rows, numbers_from=2)
    return [Folded(f"{len(rows)} paired comparisons", [table])] if rows else []


def _sample(sample: Mapping[str, Any]) -> Beside:
    columns = [Marked("reference", [(sample["reference"], False)])]
    for one in sample["answers"]:
        value = "-" if one["value"] is None else f"{one['value']:.3g}"
        columns.append(Marked(f"{one['approach']} ({value})", [(one["answer"], False)]))
    return Beside(sample["where"], sample["prompt"], columns)
