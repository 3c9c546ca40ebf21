"""One page over runs that each began where the last one ended: what was learnt, what was kept, and the runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftcli.files import write_text
from ftcli.reporting.found_run import read_run
from ftcli.reporting.markdown import markdown_text
from ftcli.reporting.page import Block, Document, Items, Section, Table, Tone, html_page
from ftcli.reporting.several import several_document
from ftcli.training.stages import proof_word, retention_lines, table_rows


def write_stages_report(path: Path, title: str, found: dict[str, Any], runs: Sequence[Path]) -> None:
    """`path` (.html) and the same words beside it (.md).

    Args:
        found: what `ftcli.training.stages.over_stages` says of the runs.
        runs: their folders, in order.
    """
    document = stages_document(title, found, runs)
    write_text(path, html_page(document))
    write_text(path.with_suffix(".md"), markdown_text(document))


def stages_document(title: str, found: dict[str, Any], runs: Sequence[Path]) -> Document:
    """The matrix of stages and sources first, then everything there is to say of the runs."""
    beside = several_document([read_run(run) for run in runs])
    failed = [proof for proof in found["proofs"] if proof["passed"] is False]
    lead = (
        [f"{len(failed)} of {len(found['proofs'])} stages did not begin where the one before ended."] if failed else retention_lines(found)
    )
    tone: Tone = "bad" if failed else beside.tone
    own = Section("What was learnt and what was kept", [_matrix(found), *_notes(found)])
    return replace(beside, title=title, tone=tone, lead=lead or beside.lead, sections=[own, *beside.sections])


def _matrix(found: dict[str, Any]) -> Table:
    headings = ["after", *found["matrix"]["sources"]]
    return Table("Bits per byte of held-out rows after each stage; lower is better", headings, table_rows(found), numbers_from=1)


def _notes(found: dict[str, Any]) -> list[Block]:
    """What the matrix leaves empty, and the proofs."""
    proofs = [f"{proof_word(proof)}: {proof['stage']} {proof['detail']}" for proof in found["proofs"]]
    lines = [*found["matrix"]["not_compared"], *proofs]
    return [Items(lines)] if lines else []
