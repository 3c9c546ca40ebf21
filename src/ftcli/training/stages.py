"""What was learnt and what was kept over runs that each began where the last one ended."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal

from ftcli.data.names import free_name
from ftcli.errors import GateError, Problem, UsageError
from ftcli.evaluation.forgetting import Retention, retention
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
    names, learnt_at, matrix = results_matrix(summaries)
    return {
        "proofs": beginning_proofs(stages, summaries),
        "matrix": {"sources": names, "learnt_at": learnt_at, "stages": ["before", *stages], "bits_per_byte": matrix},
        "retention": _to_json(retention([[None if value is None else -value for value in row] for row in matrix], learnt_at)),
    }


def results_matrix(summaries: list[Summary]) -> tuple[list[str], list[int], list[list[float | None]]]:
    """Sources, the stage each was learnt in (0: known before, or only watched), and (stages + 1, sources) bits per byte.

    Sources are the same where their rows are, whatever a run calls them; a name that an earlier run gave to other rows gets a number.
    """
    learnt_at: dict[str, int] = {}
    names: dict[str, str] = {}
    for index, summary in enumerate(summaries, 1):
        for rows, (name, measured) in _by_rows(summary, "after").items():
            if rows not in learnt_at:
                learnt_at[rows] = 0 if measured.get("role") == "retained" else index
                names[rows] = free_name(name, names.values())
    table = [_by_rows(summary, "before") for summary in summaries[:1]] + [_by_rows(summary, "after") for summary in summaries]
    return list(names.values()), list(learnt_at.values()), [[_bits(measured.get(rows)) for rows in learnt_at] for measured in table]


def _by_rows(summary: Summary, moment: Literal["before", "after"]) -> dict[str, tuple[str, Summary]]:
    """(name, what was measured) of every source, by what its rows are."""
    keys = summary.get("rows", {})
    return {keys.get(name) or name: (name, measured) for name, measured in summary[moment].items()}


def _bits(found: tuple[str, Summary] | None) -> float | None:
    return None if found is None else found[1].get("bits_per_byte")


def beginning_proofs(stages: list[str], summaries: list[Summary]) -> list[Summary]:
    """A stage measures before its first step what the one before measured after its last; `passed` is None where both measured nothing."""
    proofs = []
    for number, (before, after) in enumerate(itertools.pairwise(summaries), 2):
        passed, detail = _same_losses(_by_rows(before, "after"), _by_rows(after, "before"))
        proofs.append(
            {"stage": stages[number - 1], "passed": passed, "detail": f"began where `{stages[number - 2]}` ended: {detail}"},
        )
    return proofs


def _same_losses(old: dict[str, tuple[str, Summary]], new: dict[str, tuple[str, Summary]]) -> tuple[bool | None, str]:
    """Whether the losses of what both measured are the same, and in words."""
    both = [rows for rows in new if rows in old]
    comparable = [rows for rows in both if old[rows][1]["targets"] == new[rows][1]["targets"]]
    if not comparable:
        why = "no source is measured by both" if not both else "what both measure has other targets now (`data.max_length`, new tokens)"
        return None, f"nothing to compare, {why}"
    worst = max(_moved(old[rows][1]["loss"], new[rows][1]["loss"]) for rows in comparable)
    left_out = f"; {len(both) - len(comparable)} more have other targets now" if len(both) > len(comparable) else ""
    found = "the loss of 1 source differs" if len(comparable) == 1 else f"losses of {len(comparable)} sources differ"
    return worst <= SAME_LOSS, f"{found} by {worst:.1e} at most{left_out}"


def _moved(old: float | None, new: float | None) -> float:
    """How far apart two losses are; infinitely where one is no number, which files keep as null."""
    return math.inf if old is None or new is None else abs(new - old)


def _to_json(found: Retention) -> Summary:
    return {
        "average_bits_per_byte": None if found.average is None else -found.average,
        "backward_transfer": found.backward_transfer,
        "forgetting": found.forgetting,
        "forward_transfer": found.forward_transfer,
    }


def report_lines(found: Summary) -> list[str]:
    """The matrix as a table, what was kept, and the proofs."""
    sources, stages, matrix = (found["matrix"][key] for key in ("sources", "stages", "bits_per_byte"))
    lines = [f"| bits per byte after | {' | '.join(sources)} |", f"|---|{'--:|' * len(sources)}"] if sources else []
    if sources:
        for stage, row in zip(stages, matrix, strict=True):
            lines.append(f"| {stage} | {' | '.join('' if value is None else f'{value:.4f}' for value in row)} |")
        lines.append("")
    lines += retention_lines(found)
    lines += [f"{proof_word(proof)}: {proof['stage']} {proof['detail']}" for proof in found["proofs"]]
    return lines


def proof_word(proof: Summary) -> str:
    """How a proof of a stage's beginning came out."""
    return {True: "passed", False: "FAILED", None: "not verified"}[proof["passed"]]


def retention_lines(found: Summary) -> list[str]:
    """What later stages did to what was learnt before them, in words."""
    words = {
        "backward_transfer": "backward transfer (bits per byte that later stages won on earlier ones' sources)",
        "forgetting": "forgetting (bits per byte lost since the best)",
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
