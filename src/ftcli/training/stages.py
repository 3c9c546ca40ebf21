"""What was learnt and what was kept over runs that each began where the last one ended."""

from __future__ import annotations

import itertools
from typing import Any

from ftcli.errors import GateError, Problem
from ftcli.evaluation.forgetting import Retention, retention

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
    """Sources, the stage each was learnt in (0: known before, or only watched), and (stages + 1, sources) bits per byte."""
    learnt_at: dict[str, int] = {}
    for index, summary in enumerate(summaries, 1):
        for name, measured in summary["after"].items():
            learnt_at.setdefault(name, 0 if measured.get("role") == "retained" else index)
    rows = [summaries[0]["before"], *(summary["after"] for summary in summaries)] if summaries else []
    return list(learnt_at), list(learnt_at.values()), [[_bits(row.get(name)) for name in learnt_at] for row in rows]


def _bits(measured: Summary | None) -> float | None:
    return None if measured is None else measured.get("bits_per_byte")


def beginning_proofs(stages: list[str], summaries: list[Summary]) -> list[Summary]:
    """A stage measures before its first step what the one before measured after its last."""
    proofs = []
    for number, (before, after) in enumerate(itertools.pairwise(summaries), 2):
        shared = [
            name
            for name in after["before"]
            if name in before["after"] and before["after"][name]["targets"] == after["before"][name]["targets"]
        ]
        worst = max((abs(after["before"][name]["loss"] - before["after"][name]["loss"]) for name in shared), default=None)
        detail = "no source is measured by both" if worst is None else f"losses of {len(shared)} sources differ by {worst:.1e} at most"
        proofs.append(
            {
                "stage": stages[number - 1],
                "passed": worst is None or worst <= SAME_LOSS,
                "detail": f"began where `{stages[number - 2]}` ended: {detail}",
            }
        )
    return proofs


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
    lines += [f"proof: {proof['stage']} {proof['detail']}" + ("" if proof["passed"] else " - FAILED") for proof in found["proofs"]]
    return lines


def retention_lines(found: Summary) -> list[str]:
    """What later stages did to what was learnt before them, in words."""
    words = {
        "backward_transfer": "backward transfer (bits per byte that later stages won on earlier ones' sources)",
        "forgetting": "forgetting (bits per byte lost since the best)",
    }
    return [f"{text}: {found['retention'][key]:+.4f}" for key, text in words.items() if found["retention"][key] is not None]


def require_proven(found: Summary) -> None:
    """Refuse stages that did not go on from one another.

    Raises:
        GateError: a stage did not begin where the one before it ended.
    """
    failed = [Problem(f"stage {proof['stage']}", proof["detail"]) for proof in found["proofs"] if not proof["passed"]]
    if failed:
        raise GateError("a stage did not begin where the one before it ended", failed)
