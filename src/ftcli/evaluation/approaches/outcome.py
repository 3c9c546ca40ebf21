"""A comparison's numbers as one document: what `--json` prints, `results.json` keeps, and table and pages are made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftcli.evaluation.approaches.recipe import Comparison, FewShot, FineTuning, Prompting, Retrieval
from ftcli.evaluation.approaches.verdict import LEVEL, Approach, Pair, Verdict, compare_pairs, judge
from ftcli.evaluation.measurement import main_figure
from ftcli.evaluation.statistics import holm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftcli.evaluation.approaches.conduct import Solved
    from ftcli.evaluation.approaches.shared import Shared
    from ftcli.evaluation.tasks.task import Figure, TaskResult

MAX_SAMPLES = 4
MAX_CHARACTERS = 600
MAX_FLIPS = 20


def outcome_of(comparison: Comparison, solved: Sequence[Solved], base: dict[str, TaskResult], shared: Shared) -> dict[str, Any]:
    """Everything that is reported, ready for JSON.

    Args:
        base: what the base does on the retained tasks.
        shared: rows of the task that the approaches were given.
    """
    retained = _retained(comparison, solved, base)
    judged = [_judged(one) for one in solved]
    figure, num_rows = solved[0].figure, len(solved[0].result.rows)
    verdict = judge(judged, figure, num_rows)
    first = compare_pairs([(one, judged[0]) for one in judged[1:]])
    return {
        "name": comparison.name,
        "base": comparison.base,
        "task": comparison.task.name,
        "kind": comparison.task.kind,
        "figure": figure,
        "higher_is_better": solved[0].result.figures[figure].higher_is_better,
        "rows": num_rows,
        "precision": solved[0].precision,
        "verdict": {"finding": verdict.finding, "sentences": [*_of_shared(solved, shared), *verdict.sentences, *_of_retained(retained)]},
        "shared": shared.to_json(),
        "approaches": [_approach(one, _against(one.approach.name, verdict, first), shared) for one in solved],
        "pairs": [{"first": pair.first, "second": pair.second, **_pair(pair)} for pair in verdict.pairs],
        "retained": retained,
        "samples": _samples(solved),
    }


def _judged(one: Solved) -> Approach:
    return Approach(
        name=one.approach.name,
        is_trained=one.is_trained,
        looks_up=one.retrieve is not None,
        figure=one.result.figures[one.figure],
        where=[str(row["where"]) for row in one.result.rows],
        cost=one.prompt_tokens + one.answer_tokens,
        changed=None if one.changed is None else one.changed.figures[one.figure].interval,
    )


def _against(name: str, verdict: Verdict, first: Sequence[Pair]) -> Pair | None:
    """The pair of an approach with the first one, with the p of all comparisons of the verdict."""
    reference = {pair.second for pair in first}
    return next((pair for pair in verdict.pairs if pair.first == name and pair.second in reference), None)


def _pair(pair: Pair) -> dict[str, Any]:
    return {**pair.found.to_json(), "adjusted_p": pair.adjusted_p}


def _without_shared(one: Solved, shared: Shared) -> Figure | None:
    """The figure of the rows that no training row asks; None where all are, or it is no mean over rows."""
    import numpy as np

    return one.result.figures[one.figure].of_rows(np.array([str(row["where"]) not in shared.rows for row in one.result.rows], dtype=bool))


def _of_shared(solved: Sequence[Solved], shared: Shared) -> list[str]:
    """What was shared, and what each approach reaches on the other rows."""
    found = [(one.approach.name, _without_shared(one, shared)) for one in solved] if shared.rows else []
    shown = [f"{name} {figure.interval.value:.3g}" for name, figure in found if figure is not None]
    return [*shared.sentences(), *([f"On the other rows, {solved[0].figure}: {', '.join(shown)}."] if shown else [])]


def _approach(one: Solved, against: Pair | None, shared: Shared) -> dict[str, Any]:
    other_rows = _without_shared(one, shared) if shared.rows else None
    return {
        "name": one.approach.name,
        "kind": one.approach.kind,
        "what": what_it_is(one),
        "target": one.target,
        "figures": {name: figure.to_json() for name, figure in one.result.figures.items()},
        "rows": len(one.result.rows),
        "without_shared_rows": None if other_rows is None else other_rows.to_json(),
        "against_first": None if against is None else _pair(against),
        "prompt_tokens": one.prompt_tokens,
        "answer_tokens": one.answer_tokens,
        "seconds_a_request": one.timing.get("seconds"),
        "slowest_seconds": one.timing.get("slowest_seconds"),
        "training": one.training,
        "extra_bytes": one.extra_bytes,
        "index_seconds": one.timing.get("index_seconds") if one.retrieve is not None else None,
        "when_facts_change": when_facts_change(one),
        "changed": None if one.changed is None else one.changed.figures[one.figure].to_json(),
        "variants": one.result.details.get("variants"),
        "notes": one.result.notes,
    }


def what_it_is(one: Solved) -> str:
    """An approach in a few words."""
    match one.approach:
        case Prompting(variants=None):
            return "the base, asked as the rows ask"
        case Prompting(variants=variants):
            assert variants is not None
            return f"the base, asked in the best of {len(variants.prompts)} ways"
        case FewShot(count=count, choose=choose):
            return f"{count} solved examples ({choose})"
        case Retrieval(retrieve=retrieve):
            return f"up to {retrieve.count} passages in the prompt"
        case FineTuning(retrieve=None, method=method):
            return f"trained: {method.kind}"
        case FineTuning(retrieve=retrieve, method=method):
            assert retrieve is not None
            return f"trained: {method.kind}; up to {retrieve.count} passages in the prompt"


def when_facts_change(one: Solved) -> str:
    """What has to be done then."""
    from ftcli.units import format_seconds

    index = format_seconds(one.timing.get("index_seconds") or 0.0)
    again = "" if one.training is None else format_seconds(one.training["seconds"])
    match one.approach:
        case Prompting():
            return "edit the prompt; what the model knows by itself stays as it is"
        case FewShot():
            return "replace the examples that are wrong"
        case Retrieval():
            return f"change the documents, index again ({index})"
        case FineTuning(retrieve=None):
            return f"new rows, train again ({again})"
        case FineTuning():
            return f"change the documents, index again ({index}); train again ({again}) if the rows taught the old facts"


def _of_retained(retained: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for every retained task that is shown to have moved."""
    sentences = []
    for task in dict.fromkeys(change["task"] for change in retained):
        moved = [one for one in retained if one["task"] == task and one["p_value"] is not None and one["p_value"] < LEVEL]
        parts = [f"{one['approach']} {one['after']['value']:.3g} ({'better' if one['is_better'] else 'worse'})" for one in moved]
        if moved:
            before = f"{moved[0]['figure']} {moved[0]['before']['value']:.3g} before"
            sentences.append(f"On {task}, which was to be kept ({before}): {', '.join(parts)}.")
    return sentences


def _retained(comparison: Comparison, solved: Sequence[Solved], base: dict[str, TaskResult]) -> list[dict[str, Any]]:
    """What every trained model did to the retained tasks, with Holm's correction over all."""
    found = []
    for task in comparison.retained:
        for one in solved:
            if one.is_trained:
                figure = main_figure(task, base[task.name])
                both = base[task.name].figures[figure], one.retained[task.name].figures[figure]
                found.append({"approach": one.approach.name, "task": task.name, "figure": figure, **_change(*both)})
    tested = [change for change in found if change["p_value"] is not None]
    for change, p_value in zip(tested, holm([change["p_value"] for change in tested]), strict=True):
        change["p_value"] = p_value
    return found


def _change(before: Figure, after: Figure) -> dict[str, Any]:
    found = after.against(before)
    moved = after.interval.value - before.interval.value
    return {
        "before": before.to_json(),
        "after": after.to_json(),
        "is_better": (moved > 0) == before.higher_is_better,
        "p_value": None if found is None else found.p_value,
    }


def _samples(solved: Sequence[Solved]) -> list[dict[str, Any]]:
    """Rows that all approaches answered, those first on which they differ most."""
    rows = [{str(row["where"]): row for row in one.result.rows} for one in solved]
    values = [_values(one.result, one.figure) for one in solved]
    common = [where for where in rows[0] if all(where in others for others in rows)]
    if not common or not all("answer" in others[common[0]] or "chosen" in others[common[0]] for others in rows):
        return []

    def spread(where: str) -> float:
        found = [one.get(where, 0.0) for one in values]
        return max(found) - min(found)

    chosen = sorted(common, key=lambda where: -spread(where))[:MAX_SAMPLES]
    return [_sample(where, solved, rows, values) for where in chosen]


def _sample(where: str, solved: Sequence[Solved], rows: Sequence[dict[str, Any]], values: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {
        "where": where,
        "prompt": str(rows[0][where].get("prompt", ""))[-MAX_CHARACTERS:],
        "reference": str(rows[0][where].get("reference", rows[0][where].get("answer", "")))[:MAX_CHARACTERS],
        "answers": [
            {
                "approach": one.approach.name,
                "answer": str(found[where].get("answer" if "reference" in found[where] else "chosen", ""))[:MAX_CHARACTERS],
                "value": value.get(where),
            }
            for one, found, value in zip(solved, rows, values, strict=True)
        ],
    }


def _values(result: TaskResult, figure: str) -> dict[str, float]:
    values = result.figures[figure].values
    if values is None:
        return {}
    return {str(row["where"]): float(value) for row, value in zip(result.rows, values, strict=True)}
