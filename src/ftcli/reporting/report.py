"""report.html: one self-contained page that tells a run to someone who was not there.

No script, no font and no picture is fetched from anywhere; everything that comes from data or recipe is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftcli.files import write_text
from ftcli.reporting.found_run import FoundRun, Sample, read_run
from ftcli.reporting.labels import label_section
from ftcli.reporting.live import EvaluationRow, evaluation_table, is_metric
from ftcli.reporting.plot import inline_svg
from ftcli.units import format_seconds

MAX_SAMPLES = 8
REPORT = "report.html"

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --paper: #ffffff; --panel: #f6f8fa;
  --good: #1a7f37; --bad: #cf222e; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --paper: #0d1117;
  --panel: #151b23; --good: #3fb950; --bad: #f85149; --mark: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p.lead { font-size: 1.08rem; margin: .25rem 0 0; }
.soft { color: var(--soft); }
.state { display: inline-block; font-size: .8rem; font-weight: 600; padding: .1rem .6rem; border-radius: 1rem; border: 1px solid;
  vertical-align: middle; }
.good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.same td { border-bottom-color: transparent; }
pre, code { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .75rem 1rem; margin: .4rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details > summary { cursor: pointer; color: var(--mark); }
figure { margin: 0; } svg { width: 100%; height: auto; }
.sample { border: 1px solid var(--line); border-radius: .4rem; padding: .25rem 1rem .75rem; margin: .75rem 0; }
.sample h3 { font-size: .8rem; color: var(--soft); margin: .6rem 0 .1rem; font-weight: 600; }
.sample pre { margin: 0; padding: .4rem .6rem; }
@media (min-width: 45rem) { .columns { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; } }
"""


def write_report(run_folder: Path) -> None:
    """Write report.html into a run folder, from what the folder holds; what is missing is left out of the page."""
    write_text(run_folder / REPORT, report_page(read_run(run_folder)))


def report_page(run: FoundRun) -> str:
    """The page as text."""
    rows = evaluation_table(run.before, run.after)
    sections = [
        ("Before and after", _evaluation(rows)),
        ("Labels", label_section(run.path)),
        ("Losses", f"<figure>{inline_svg(run.metrics.records)}</figure>" if run.metrics.records else ""),
        ("Proofs", _proofs(run.proofs)),
        ("Data", _data(run.data)),
        ("Answers before and after", _samples(run.samples)),
        ("Recipe", _details("the resolved recipe", f"<pre>{escape(run.recipe_text)}</pre>") if run.recipe_text else ""),
        ("Environment", _environment(run)),
        ("What could not be read", _list(run.damage)),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections if content)
    tone = {"finished": "good", "failed": "bad", "killed": "bad"}.get(run.state, "soft")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)} - ftcli</title>
<style>{STYLE}</style>
</head>
<body><main>
<h1>{escape(run.name)} <span class="state {tone}">{run.state}</span></h1>
<p class="lead">{escape(headline(run, rows))}</p>
{body}
</main></body>
</html>
"""


def headline(run: FoundRun, rows: Sequence[EvaluationRow]) -> str:
    """What was trained and what came of it, in one sentence or two."""
    trained = f"{run.method} on {run.base}, {run.step} steps"
    if run.seconds is not None:
        trained += f" in {format_seconds(run.seconds)}"
    told = [row for row in rows if _is_headline(row)]
    results = []
    for row in told:
        source, measure, before, after, change = row.cells()
        moved = f"{before} to {after}" if row.before is not None else after
        results.append(f"{source} {measure} {moved}" + (f" ({change})" if change else ""))
    return trained + (": " + "; ".join(results) if results else "")


def _is_headline(row: EvaluationRow) -> bool:
    """What says most of a source: its metrics and its loss; of a retained one bits per byte, which compare between tokenizers."""
    if is_metric(row.measure):
        return row.measure != "stopped_ratio"
    return row.measure == ("bits_per_byte" if row.role == "retained" else "loss")


def _evaluation(rows: Sequence[EvaluationRow]) -> str:
    cells = [row.cells() for row in rows]
    body = []
    for index, (source, *rest) in enumerate(cells):
        is_first = index == 0 or cells[index - 1][0] != source
        is_last = index + 1 == len(cells) or cells[index + 1][0] != source
        body.append(_row([source if is_first else "", *rest], numbers_from=2, kind="" if is_last else "same"))
    return _table(["source", "measure", "before", "after", "change"], body, numbers_from=2)


def _proofs(proofs: Sequence[Mapping[str, Any]]) -> str:
    body = []
    for proof in proofs:
        mark = '<td class="good">passed</td>' if proof.get("passed") else '<td class="bad"><strong>failed</strong></td>'
        body.append(f"<tr>{mark}<td>{escape(str(proof.get('name', '')))}</td><td>{escape(str(proof.get('detail', '')))}</td></tr>")
    return _table(["", "proof", "detail"], body)


def _data(reports: Sequence[Mapping[str, Any]]) -> str:
    headings = ["source", "use", "format", "rows read", "dropped", "examples", "overlong", "tokens", "targets", "p50", "p95", "longest"]
    body = [_row(data_cells(report), numbers_from=3) for report in reports]
    ends = [
        _row([str(report.get("name", "")), repr(report.get("first_target")), repr(report.get("last_target"))])
        for report in reports
        if report.get("first_target") is not None
    ]
    return _table(headings, body, numbers_from=3) + _table(["source", "first target", "last target"], ends)


def data_cells(report: Mapping[str, Any]) -> list[str]:
    """One source's accounting as text: name, use, format, rows, dropped and why, examples, overlong, tokens, targets, lengths."""
    dropped = _mapping(report.get("dropped"))
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "0"
    keys = ("num_examples", "num_overlong", "num_tokens", "num_targets", "length_p50", "length_p95", "length_max")
    names = [str(report.get(key, "")) for key in ("name", "use", "format")]
    return [*names, _count(report.get("rows_read")), reasons, *(_count(report.get(key)) for key in keys)]


def _samples(samples: Sequence[Sample]) -> str:
    shown = []
    for sample in samples[:MAX_SAMPLES]:
        answers = [("reference", sample.reference), ("before", sample.before), ("after", sample.after)]
        columns = "".join(f"<div><h3>{title}</h3><pre>{escape(text)}</pre></div>" for title, text in answers if text is not None)
        prompt = f"<h3>{escape(sample.source)}: prompt</h3><pre>{escape(sample.prompt)}</pre>"
        shown.append(f'<div class="sample">{prompt}<div class="columns">{columns}</div></div>')
    return "".join(shown)


def _environment(run: FoundRun) -> str:
    facts: dict[str, Any] = {key: value for key, value in run.environment.items() if key != "versions"}
    facts |= {key: run.manifest.get(key) for key in ("seed", "lr", "best_step")}
    for group in ("parameters", "layout", "hashes"):
        facts |= {f"{group}: {key}": value for key, value in _mapping(run.manifest.get(group)).items()}
    facts |= {f"version of {name}": version for name, version in run.versions.items()}
    body = [_row([key.replace("_", " "), str(value)]) for key, value in facts.items() if value is not None]
    return _details("versions, device, hashes", _table(["", ""], body)) if body else ""


def _table(headings: Sequence[str], body: Sequence[str], numbers_from: int = 99) -> str:
    if not body:
        return ""
    head = "".join(f"<th{_number_class(index, numbers_from)}>{escape(text)}</th>" for index, text in enumerate(headings))
    header = f"<thead><tr>{head}</tr></thead>" if any(headings) else ""
    return f'<div class="scroll"><table>{header}<tbody>{"".join(body)}</tbody></table></div>'


def _row(cells: Iterable[str], numbers_from: int = 99, kind: str = "") -> str:
    inner = "".join(f"<td{_number_class(index, numbers_from)}>{escape(text)}</td>" for index, text in enumerate(cells))
    return f'<tr class="{kind}">{inner}</tr>' if kind else f"<tr>{inner}</tr>"


def _number_class(index: int, numbers_from: int) -> str:
    return ' class="number"' if index >= numbers_from else ""


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else "-"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
