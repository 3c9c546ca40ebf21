"""report.html and report.md: a run told to someone who was not there, verdict first.

The same sections make both; no script, font or picture is fetched from anywhere.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftcli.files import write_text
from ftcli.reporting.curves import run_figures
from ftcli.reporting.diagnosis.diagnose import RULES, Diagnosis, diagnose
from ftcli.reporting.found_run import FoundRun, Sample, read_run
from ftcli.reporting.holding import holding_blocks
from ftcli.reporting.labels import label_blocks
from ftcli.reporting.live import EvaluationRow, evaluation_table, is_metric, shown_path
from ftcli.reporting.markdown import markdown_text
from ftcli.reporting.mixture import mixture_blocks
from ftcli.reporting.page import Beside, Block, Code, Document, Folded, Items, Marked, Section, Table, Text, Tone, html_page
from ftcli.reporting.rows_compared import PAIRED_HEADINGS, before_and_after, interval_of, loss_interval, paired, read_scores
from ftcli.units import format_bytes, format_count, format_seconds

MAX_SAMPLES = 8
REPORT, REPORT_TEXT = "report.html", "report.md"
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")


def write_report(run_folder: Path) -> None:
    """Write report.html and report.md into a run folder, from what the folder holds; what is missing is left out."""
    document = run_document(read_run(run_folder))
    write_text(run_folder / REPORT, html_page(document))
    write_text(run_folder / REPORT_TEXT, markdown_text(document))


def report_page(run: FoundRun) -> str:
    """The page as text."""
    return html_page(run_document(run))


def run_document(run: FoundRun) -> Document:
    """Everything there is to say of one run."""
    rows, diagnosis = evaluation_table(run.before, run.after), diagnose(run)
    tones: dict[str, Tone] = {"finished": "good", "failed": "bad", "killed": "bad"}
    sections = [
        Section("Diagnosis", _diagnosis(diagnosis)),
        Section("Before and after", _evaluation(run, rows)),
        Section("Forgetting", _forgetting(rows)),
        Section("Curves", run_figures(run)),
        Section("Held near the start", holding_blocks(run)),
        Section("Labels", label_blocks(run.path)),
        Section("Answers before and after", _samples(run.samples)),
        Section("Proofs", _proofs(run.proofs)),
        Section("Data", [*_data(run.data, run.manifest), *mixture_blocks(run.manifest)]),
        Section("What is learnt of a row", _masks(run.manifest.get("mask_samples"))),
        Section("Cost", _cost(run)),
        Section("Recipe, and how to do it again", _recipe(run)),
        Section("Environment", _environment(run)),
        Section("What could not be read", [Items(run.damage)] if run.damage else []),
    ]
    return Document(run.name, run.state, tones.get(run.state, "soft"), [headline(run, rows), verdict(run, diagnosis)], sections)


def headline(run: FoundRun, rows: Sequence[EvaluationRow]) -> str:
    """What was trained and what came of it, in one sentence or two."""
    trained = f"{run.method} on {run.base}, {run.step} steps"
    if run.seconds is not None:
        trained += f" in {format_seconds(run.seconds)}"
    results = []
    for row in (row for row in rows if _is_headline(row)):
        source, measure, before, after, change = row.cells()
        moved = f"{before} to {after}" if row.before is not None else after
        results.append(f"{source} {measure} {moved}" + (f" ({change})" if change else ""))
    return trained + (": " + "; ".join(results) if results else "")


def verdict(run: FoundRun, diagnosis: Diagnosis) -> str:
    """Whether the proofs hold and what the diagnosis says, in one sentence or two."""
    failed = [str(proof.get("name")) for proof in run.proofs if not proof.get("passed")]
    proofs = (
        f"Not proven: {', '.join(failed)}." if failed else f"All {len(run.proofs)} proofs passed." if run.proofs else "Nothing was proven."
    )
    if diagnosis.findings:
        return f"{proofs} Diagnosis: {'; '.join(finding.name for finding in diagnosis.findings)}."
    return f"{proofs} The diagnosis found nothing wrong."


def _is_headline(row: EvaluationRow) -> bool:
    """What says most of a source: its metrics and its loss; of a retained one bits per byte, which compare between tokenizers."""
    if is_metric(row.measure):
        return row.measure != "stopped_ratio"
    return row.measure == ("bits_per_byte" if row.role == "retained" else "loss")


def _diagnosis(diagnosis: Diagnosis) -> list[Block]:
    blocks: list[Block] = []
    for finding in diagnosis.findings:
        blocks += [Text(f"{finding.name}: {finding.sentence}."), Items([text for text in finding.evidence if text])]
        blocks += [Text("To try next:", is_soft=True), Items(finding.advice)]
    if not blocks:
        looked = [name for name in RULES if name not in diagnosis.unjudged]
        blocks.append(Text(f"Nothing found. Looked for: {', '.join(looked) or 'nothing'}."))
    if diagnosis.unjudged:
        told = [f"{name}: {why}" for name, why in diagnosis.unjudged.items()]
        blocks.append(Folded(f"{len(told)} of {len(RULES)} rules could not judge", [Items(told)]))
    return blocks


def _evaluation(run: FoundRun, rows: Sequence[EvaluationRow]) -> list[Block]:
    blocks: list[Block] = []
    begun, ended = before_and_after(read_scores(run.path))
    cells = []
    for row in rows:
        source, measure, before, after, change = row.cells()
        key = (row.source, row.measure)
        cells.append([source, measure, before, after, change, _interval(run, row, ended.get(key))])
    headings = ["source", "measure", "before", "after", "change", "after, 95 %"]
    if cells:
        blocks.append(Table("Measures of held-out data before and after training", headings, cells, numbers_from=2))
    if compared := paired(begun, ended):
        blocks.append(Table("After against before, the same rows", PAIRED_HEADINGS, [one.cells() for one in compared], numbers_from=3))
    return blocks


def _interval(run: FoundRun, row: EvaluationRow, scores: Mapping[str, float] | None) -> str:
    """The interval of the value after training: of a loss from its standard error, of a metric from its rows."""
    if row.measure == "loss" and row.after is not None:
        error = run.after.get(row.source, {}).get("loss_error")
        return loss_interval(row.after, error) if isinstance(error, float) and error > 0 else ""
    if not scores or row.after is None:
        return ""
    found = interval_of(scores)
    # A metric that is not the mean of its rows has no interval of that mean.
    return f"{100 * found.low:.1f} to {100 * found.high:.1f} %" if abs(found.value - row.after) < 1e-6 else ""


def _forgetting(rows: Sequence[EvaluationRow]) -> list[Block]:
    kept = [row for row in rows if row.role == "retained" and row.before is not None and row.after is not None]
    if not kept:
        return []
    return [
        Table(
            "What the model could do before, measured again",
            ["source", "measure", "before", "after", "change"],
            [row.cells() for row in kept],
            numbers_from=2,
        )
    ]


def _samples(samples: Sequence[Sample]) -> list[Block]:
    if not samples:
        return []
    blocks: list[Block] = [Text("Marked is what is not in the reference.", is_soft=True)]
    for sample in samples[:MAX_SAMPLES]:
        columns = [Marked("reference", [(sample.reference, False)])]
        for title, text in (("before", sample.before), ("after", sample.after)):
            columns += [] if text is None else [Marked(title, marked_difference(sample.reference, text))]
        blocks.append(Beside(f"{sample.source}: prompt", sample.prompt, columns))
    return blocks


def marked_difference(reference: str, text: str) -> list[tuple[str, bool]]:
    """`text` in pieces, those that are not the reference's marked.

    Example:
        >>> marked_difference("two large teas", "two small teas")
        [('two ', False), ('small', True), (' teas', False)]
    """
    ours, theirs = _WORDS.findall(text), _WORDS.findall(reference)
    if len(ours) * len(theirs) > 4_000_000:
        return [(text, text != reference)]
    pieces: list[tuple[str, bool]] = []
    for tag, _, _, start, end in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if start < end:
            pieces.append(("".join(ours[start:end]), tag != "equal"))
    return pieces


def _proofs(proofs: Sequence[Mapping[str, Any]]) -> list[Block]:
    marks: list[tuple[str, Tone]] = [("passed", "good") if proof.get("passed") else ("failed", "bad") for proof in proofs]
    rows = [[str(proof.get("name", "")), str(proof.get("detail", ""))] for proof in proofs]
    table = Table("What was computed to be sure", ["proof", "detail"], rows, marks=marks)
    return [table, Text("`ftcli verify` replays them against what is there now.", is_soft=True)] if proofs else []


def _data(reports: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> list[Block]:
    headings = ["source", "use", "format", "rows read", "dropped", "examples", "overlong", "tokens", "targets", "p50", "p95", "longest"]
    blocks: list[Block] = []
    if reports:
        blocks.append(Table("From rows to targets", headings, [data_cells(report) for report in reports], numbers_from=3))
    ends = [
        [str(report.get("name", "")), repr(report.get("first_target")), repr(report.get("last_target"))]
        for report in reports
        if report.get("first_target") is not None
    ]
    if ends:
        blocks.append(Table("First and last target of the first example", ["source", "first target", "last target"], ends))
    notes = manifest.get("notes")
    return [*blocks, Items([str(note) for note in notes])] if isinstance(notes, list) and notes else blocks


def data_cells(report: Mapping[str, Any]) -> list[str]:
    """One source's accounting as text: name, use, format, rows, dropped and why, examples, overlong, tokens, targets, lengths."""
    dropped = _mapping(report.get("dropped"))
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "0"
    keys = ("num_examples", "num_overlong", "num_tokens", "num_targets", "length_p50", "length_p95", "length_max")
    names = [str(report.get(key, "")) for key in ("name", "use", "format")]
    return [*names, _count(report.get("rows_read")), reasons, *(_count(report.get(key)) for key in keys)]


def _masks(samples: object) -> list[Block]:
    blocks: list[Block] = []
    for sample in samples if isinstance(samples, list) else []:
        pieces = sample.get("pieces") if isinstance(sample, Mapping) else None
        if isinstance(pieces, list):
            kept = [(str(piece[0]), bool(piece[1])) for piece in pieces if isinstance(piece, list) and len(piece) == 2]
            blocks.append(Marked(f"{sample.get('source')}: {sample.get('where')}", kept))
    return [Text("Marked is what is learnt; the rest is context.", is_soft=True), Folded("rows with their masks", blocks)] if blocks else []


def _cost(run: FoundRun) -> list[Block]:
    trains = run.metrics.of_kind("train")
    last = trains[-1] if trains else {}
    memory, parameters = _mapping(run.manifest.get("peak_memory_bytes")), _mapping(run.manifest.get("parameters"))
    artefact = run.path / run.artefact if run.artefact else None
    size = sum(path.stat().st_size for path in artefact.rglob("*") if path.is_file()) if artefact is not None else None
    trainable, total = parameters.get("trainable"), parameters.get("total")
    facts = {
        "time in steps": format_seconds(run.seconds) if run.seconds is not None else None,
        "time in all": _seconds(run.manifest.get("total_seconds")),
        "tokens seen": _count(last.get("tokens")) if last.get("tokens") else None,
        "targets seen": _count(last.get("targets")) if last.get("targets") else None,
        "most memory of the process": _bytes(memory.get("process")),
        "most memory of the accelerator": _bytes(memory.get("accelerator")),
        "numbers that train": f"{format_count(trainable)} of {format_count(total)}"
        if isinstance(trainable, int) and isinstance(total, int)
        else None,
        f"size of {run.artefact}": _bytes(size),
    }
    rows = [[name, value] for name, value in facts.items() if value is not None]
    return [Table("What it took", ["what", "how much"], rows, numbers_from=1)] if rows else []


def _recipe(run: FoundRun) -> list[Block]:
    if not run.recipe_text:
        return []
    path = shown_path(run.path)
    again = "ftcli train recipe.resolved.yaml --set name=again --set output=again"
    lines = [f"{again}  # in {path}: the same versions, data and seed give the same weights", f"ftcli verify {path}"]
    return [Code("\n".join(lines)), Code(run.recipe_text, "the resolved recipe")]


def _environment(run: FoundRun) -> list[Block]:
    facts: dict[str, Any] = {key: value for key, value in run.environment.items() if key != "versions"}
    facts |= {key: run.manifest.get(key) for key in ("seed", "lr", "best_step")}
    for group in ("parameters", "layout", "hashes"):
        facts |= {f"{group}: {key}": value for key, value in _mapping(run.manifest.get(group)).items()}
    facts |= {f"version of {name}": version for name, version in run.versions.items()}
    rows = [[key.replace("_", " "), str(value)] for key, value in facts.items() if value is not None]
    table = Table("Versions, device and hashes", ["what", "value"], rows)
    return [Folded("versions, device, hashes", [table])] if rows else []


def _seconds(value: object) -> str | None:
    return format_seconds(value) if isinstance(value, int | float) else None


def _bytes(value: object) -> str | None:
    return format_bytes(value) if isinstance(value, int | float) else None


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) else "-"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
