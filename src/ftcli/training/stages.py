"""What was learnt and what was kept over runs that each began where the last one ended."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from ftcli.data.names import free_name
from ftcli.errors import GateError, Problem, UsageError
from ftcli.evaluation.forgetting import retention
from ftcli.recipe.chain import STAGES, SUMMARY_FILE

# A stage measures at its start what the one before measured at its end; an adapter merged in bfloat16 is rounded once.
SAME_LOSS = 5e-3
Summary = dict[str, Any]


def over_stages(stages: list[str], summaries: list[Summary]) -> Summary:
    """Proofs, the matrix of stages and evaluation sources, and what was kept.

    Args:
        stages: names of the runs, in order.
        summaries: what each run said of itself when it was finished.
    """
    columns = results_columns(summaries)
    return {
        "proofs": beginning_proofs(stages, summaries),
        "matrix": {
            "sources": [column.name for column in columns],
            "learnt_at": [column.learnt_at for column in columns],
            "stages": ["before", *stages],
            "bits_per_byte": [list(row) for row in zip(*(column.bits_per_byte for column in columns), strict=True)]
            or [[] for _ in range(len(stages) + 1)],
            "not_compared": [
                f"`{column.name}` after `{stages[stage - 1]}` is left empty: its text was cut otherwise ({how})"
                for column in columns
                for stage, how in column.cut_otherwise.items()
            ],
        },
        "retention": _kept(columns),
    }


@dataclass(slots=True)
class Column:
    """What the stages measured of one source."""

    name: str
    bits_per_byte: list[float | None]
    """Before the first stage and after each; None where it was not measured, or on its text cut otherwise than when it was first."""
    targets: list[int] = field(default_factory=list)
    """The stages, counted from 1, that list it as a target of their own."""
    cut_otherwise: dict[int, str] = field(default_factory=dict)
    """Stages that measured it on its text cut otherwise, and how."""

    @property
    def learnt_at(self) -> int:
        """The last stage that learnt it; 0 where all only watched it."""
        return max(self.targets, default=0)


def results_columns(summaries: Sequence[Summary]) -> list[Column]:
    """Every source that was measured after any stage.

    Sources are the same where their rows are, whatever a run calls them; a name that an earlier run gave to other rows gets a number.
    """
    columns: dict[str, Column] = {}
    cut: dict[str, str | None] = {}
    for stage, summary in enumerate(summaries, 1):
        for rows, (name, measured) in _by_rows(summary, "after").items():
            if rows not in columns:
                columns[rows] = Column(free_name(name, [one.name for one in columns.values()]), [None] * (len(summaries) + 1))
            column = columns[rows]
            if measured.get("role") != "retained":
                column.targets.append(stage)
            how = _cut(summary, name)
            if cut.setdefault(rows, how) != how:
                column.cut_otherwise[stage] = how or "no row is too long"
                continue
            column.bits_per_byte[stage] = measured.get("bits_per_byte")
            if stage == 1:
                column.bits_per_byte[0] = summary["before"].get(name, {}).get("bits_per_byte")
    return list(columns.values())


def _by_rows(summary: Summary, moment: Literal["before", "after"]) -> dict[str, tuple[str, Summary]]:
    """(name, what was measured) of every source, by what its rows are."""
    keys = summary.get("rows", {})
    return {keys.get(name) or name: (name, measured) for name, measured in summary[moment].items()}


def _cut(summary: Summary, name: str) -> str | None:
    """How the rows of a source that were too long were cut; None where none was."""
    found: str | None = summary.get("cut", {}).get(name)
    return found


def _kept(columns: Sequence[Column]) -> Summary:
    """What became of the sources that were learnt before the last stage, on average, and of each source.

    A source that a later stage learns again, or that none learnt, says nothing of transfer: how much of it was lost is told by source.
    """
    measured = zip(*(column.bits_per_byte for column in columns), strict=True)
    matrix = [[None if value is None else -value for value in row] for row in measured]
    if not matrix:
        return {**dict.fromkeys(("average_bits_per_byte", "backward_transfer", "forgetting", "forward_transfer")), "by_source": []}
    since_last = retention(matrix, [column.learnt_at for column in columns])
    since_first = retention(matrix, [min(column.targets, default=0) for column in columns])
    is_earlier = [0 < column.learnt_at < len(matrix) - 1 for column in columns]
    by_source = [
        {"backward_transfer": last.backward_transfer if counts else None, "forgetting": first.forgetting}
        for counts, last, first in zip(is_earlier, since_last.tasks, since_first.tasks, strict=True)
    ]
    counted = [one for one, counts in zip(by_source, is_earlier, strict=True) if counts]
    return {
        "average_bits_per_byte": None if since_last.average is None else -since_last.average,
        **{key: _mean([one[key] for one in counted]) for key in ("backward_transfer", "forgetting")},
        "forward_transfer": since_first.forward_transfer,
        "by_source": by_source,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def beginning_proofs(stages: list[str], summaries: list[Summary]) -> list[Summary]:
    """A stage measures before its first step what the one before measured after its last; `passed` is None where both measured nothing."""
    proofs = []
    for number, (before, after) in enumerate(itertools.pairwise(summaries), 2):
        passed, detail = _same_losses(before, after)
        proofs.append(
            {"stage": stages[number - 1], "passed": passed, "detail": f"began where `{stages[number - 2]}` ended: {detail}"},
        )
    return proofs


def _same_losses(before: Summary, after: Summary) -> tuple[bool | None, str]:
    """Whether the losses of what both measured are the same, and in words."""
    old, new = _by_rows(before, "after"), _by_rows(after, "before")
    both = [rows for rows in new if rows in old]
    comparable = [
        rows
        for rows in both
        if old[rows][1]["targets"] == new[rows][1]["targets"] and _cut(before, old[rows][0]) == _cut(after, new[rows][0])
    ]
    if not comparable:
        others = "what both measure is cut otherwise or has other targets now (`max_length`, new tokens)"
        return None, f"nothing to compare, {others if both else 'no source is measured by both'}"
    worst = max(_moved(old[rows][1]["loss"], new[rows][1]["loss"]) for rows in comparable)
    left_out = f"; {len(both) - len(comparable)} more cannot be compared" if len(both) > len(comparable) else ""
    found = "the loss of 1 source differs" if len(comparable) == 1 else f"losses of {len(comparable)} sources differ"
    return worst <= SAME_LOSS, f"{found} by {worst:.1e} at most{left_out}"


def _moved(old: float | None, new: float | None) -> float:
    """How far apart two losses are; infinitely where one is no number, which files keep as null."""
    return math.inf if old is None or new is None else abs(new - old)


def report_lines(found: Summary) -> list[str]:
    """The matrix as a table, what was kept, and the proofs."""
    sources = found["matrix"]["sources"]
    lines = [f"| bits per byte after | {' | '.join(sources)} |", f"|---|{'--:|' * len(sources)}"] if sources else []
    if sources:
        lines += [f"| {' | '.join(row)} |" for row in table_rows(found)]
        lines.append("")
    lines += found["matrix"]["not_compared"]
    lines += retention_lines(found)
    lines += [f"{proof_word(proof)}: {proof['stage']} {proof['detail']}" for proof in found["proofs"]]
    return lines


def table_rows(found: Summary) -> list[list[str]]:
    """The matrix with the stages' names, and below it where each source was learnt and what became of it since."""
    matrix, by_source = found["matrix"], found["retention"]["by_source"]
    rows = [
        [stage, *("" if value is None else f"{value:.4f}" for value in row)]
        for stage, row in zip(matrix["stages"], matrix["bits_per_byte"], strict=True)
    ]
    rows.append(["learnt in", *(matrix["stages"][stage] if stage else "(only watched)" for stage in matrix["learnt_at"])])
    for words, key in (("won by later stages", "backward_transfer"), ("lost since the best", "forgetting")):
        rows.append([words, *("" if one[key] is None else f"{one[key]:+.4f}" for one in by_source)])
    return [row for row in rows if any(row[1:])]


def proof_word(proof: Summary) -> str:
    """How a proof of a stage's beginning came out."""
    return {True: "passed", False: "FAILED", None: "not verified"}[proof["passed"]]


def retention_lines(found: Summary) -> list[str]:
    """What later stages did to what was learnt before them, in words."""
    words = {
        "backward_transfer": "backward transfer (bits per byte that later stages won on what earlier ones had learnt)",
        "forgetting": "forgetting (bits per byte lost of it since its best)",
    }
    return [f"{text}: {found['retention'][key]:+.4f}" for key, text in words.items() if found["retention"][key] is not None]


def read_chain(folder: Path) -> Summary:
    """What chain.json says."""
    found: Summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    return found


def last_run(folder: Path) -> Path:
    """The folder of a chain's last stage, where `folder` is a finished chain's; else `folder` itself.

    Raises:
        UsageError: the chain is not finished.
    """
    if not (folder / SUMMARY_FILE).is_file():
        return folder
    found = read_chain(folder)
    if found["status"] != "finished":
        raise UsageError(f"the chain `{folder}` is not finished", hint="ftcli train --resume goes on with it")
    # Not where it was written: a chain's folder may be moved.
    return folder / STAGES / Path(found["stages"][-1]["folder"]).name


def require_proven(found: Summary) -> None:
    """Refuse stages that did not go on from one another.

    Raises:
        GateError: a stage did not begin where the one before it ended.
    """
    failed = [Problem(f"stage {proof['stage']}", proof["detail"]) for proof in found["proofs"] if proof["passed"] is False]
    if failed:
        raise GateError("a stage did not begin where the one before it ended", failed)
