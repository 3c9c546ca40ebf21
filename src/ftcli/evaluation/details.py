"""What stands beside the figures of a task, in lines for people: prompts tried, groups, clean rows, stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, UsageError
from ftcli.evaluation.forgetting import Retention, retention
from ftcli.evaluation.measurement import main_figure

if TYPE_CHECKING:
    from ftcli.evaluation.evaluate import Change, Evaluated
    from ftcli.evaluation.tasks import Task
    from ftcli.evaluation.tasks.task import Figure, TaskResult

MAX_LINES = 12


def detail_lines(result: TaskResult) -> list[str]:
    """One line for each prompt and group, and one for the clean rows."""
    lines = []
    if (variants := result.details.get("variants")) is not None:
        for row in variants["table"]:
            mark = "chosen" if row["name"] == variants["chosen"] else _chance(row["p_value"])
            lines.append(f"prompt {row['name']}: {variants['figure']} {_interval(row)} on {variants['validation_rows']} rows, {mark}")
    if (groups := result.details.get("groups")) is not None:
        listed = [f"{groups['column']} {row['group']} ({row['rows']} rows): {groups['figure']} {_interval(row)}" for row in groups["table"]]
        lines += _few(listed)
    if (clean := result.details.get("clean")) is not None:
        lines.append(_clean_line(clean))
    return lines


def _clean_line(clean: Mapping[str, Any]) -> str:
    if not clean["checked"]:
        return "clean rows: no training data is known; name it under `leakage.train`"
    found = f"{len(clean['leaked'])} rows stand in the {clean['training_rows']} training rows"
    if not clean["leaked"]:
        return f"clean rows: none of the rows stands in the {clean['training_rows']} training rows"
    if not clean["figures"]:
        return f"clean rows: {found}, and none is left to measure"
    shown = "; ".join(f"{name} {_interval(value)}" for name, value in list(clean["figures"].items())[:4])
    first = clean["leaked"][0]
    return f"clean rows: {found} ({first['where']} is {first['kind']} in {first['other']}, ...); the other {clean['rows']}: {shown}"


def details_json(result: TaskResult) -> dict[str, Any]:
    """The details without the group of every row, of which there may be many."""
    found = dict(result.details)
    if "groups" in found:
        found["groups"] = {name: value for name, value in found["groups"].items() if name != "rows"}
    return found


def flip_rows(change: Change, before: TaskResult, after: TaskResult) -> Iterator[dict[str, Any]]:
    """Every row that was lost or gained, with what both models did to it."""
    flips = {**dict.fromkeys(change.lost, "lost"), **dict.fromkeys(change.gained, "gained")}
    for old, new in zip(before.rows, after.rows, strict=True):
        if (flip := flips.get(str(new["where"]))) is not None:
            yield {"flip": flip, "where": new["where"], "before": old, "after": new}


def change_lines(change: Change) -> list[str]:
    """The flip table of right-or-wrong rows, groups that moved, and the comparison on clean rows."""
    flips = []
    if change.comparison.test == "mcnemar":
        neither = change.comparison.num_rows - change.kept - len(change.lost) - len(change.gained)
        shown = [f"{word} {len(rows)}{_first(rows)}" for word, rows in (("lost", change.lost), ("gained", change.gained))]
        flips = [f"right in both {change.kept}, {', '.join(shown)}, wrong in both {neither}"]
    moved = [one for one in change.groups if one["adjusted_p"] < 0.05]
    lines = flips + _few([f"{one['group']}: {_moved(one)}, {'better' if one['is_better'] else 'worse'}" for one in moved])
    if change.groups:
        lines.append(f"{len(change.groups) - len(moved)} of {len(change.groups)} groups are not shown to have moved")
    if change.clean is not None:
        found = change.clean
        lines.append(f"on the {found.num_rows} clean rows: {found.difference.value:+.4g}, p {found.p_value:.2g}")
    return lines


def divergence_lines(target: str, figures: Mapping[str, Figure]) -> list[str]:
    return [f"{target} on {task}: KL(base || tuned) {_interval(figure.to_json())} nats a token" for task, figure in figures.items()]


def stages_of(found: Mapping[str, Evaluated], stages: Sequence[str], base: Evaluated | None, tasks: Sequence[Task]) -> dict[str, Any]:
    """The matrix of stages and tasks, with what was kept, ready for JSON. Figures of which less is better are negated: see `turned`.

    What is a mean over tasks is one over tasks of the same figure, under `measures`; that of all tasks is None where figures are several.

    Args:
        stages: the targets in the order in which they were trained.

    Raises:
        UsageError: a task was trained at a stage that is not there.
    """
    late = [task for task in tasks if task.stage is not None and task.stage > len(stages)]
    if late:
        problems = [Problem(f"task `{task.name}`", f"`stage: {task.stage}`, and there are {len(stages)} models", None) for task in late]
        raise UsageError("a task was trained at a stage that is not there", problems, hint="name the models in the order of their training")
    rows = [base, *(found[stage] for stage in stages)]
    matrix = [[None if one is None else _goodness(task, one) for task in tasks] for one in rows]
    learnt_at = [task.stage or 0 for task in tasks]
    figures = [main_figure(task, found[stages[-1]].results[task.name]) for task in tasks]
    turned = [not found[stages[-1]].results[task.name].figures[name].higher_is_better for task, name in zip(tasks, figures, strict=True)]
    over_all = retention(matrix, learnt_at)
    measures = {}
    for figure in dict.fromkeys(figures):
        places = [place for place, name in enumerate(figures) if name == figure]
        of_figure = retention([[row[place] for place in places] for row in matrix], [learnt_at[place] for place in places])
        measures[figure] = {"tasks": [tasks[place].name for place in places], "turned": turned[places[0]], **_measures(of_figure)}
    return {
        "tasks": [task.name for task in tasks],
        "figures": figures,
        "turned": turned,
        "learnt_at": learnt_at,
        "matrix": matrix,
        **(_measures(over_all) if len(measures) == 1 else dict.fromkeys(_STAGE_MEASURES)),
        "measures": measures,
        "by_task": [{"backward_transfer": task.backward_transfer, "forgetting": task.forgetting} for task in over_all.tasks],
    }


def _goodness(task: Task, one: Evaluated) -> float:
    result = one.results[task.name]
    figure = result.figures[main_figure(task, result)]
    return figure.interval.value * (1 if figure.higher_is_better else -1)


_STAGE_MEASURES = ("average", "backward_transfer", "forgetting", "forward_transfer")


def _measures(found: Retention) -> dict[str, Any]:
    return {name: getattr(found, name) for name in _STAGE_MEASURES}


def stage_lines(report: Mapping[str, Any], stages: Sequence[str]) -> list[str]:
    """The matrix, with every figure as it is, and the measures of each figure, as text."""
    names = ["base", *stages]
    width = max(map(len, names))
    columns = [
        f"{task} ({'base' if stage == 0 else f'stage {stage}'}; {figure.replace('_', ' ')}{', less is better' if turned else ''})"
        for task, stage, figure, turned in zip(*(report[key] for key in ("tasks", "learnt_at", "figures", "turned")), strict=True)
    ]
    signs = [-1 if turned else 1 for turned in report["turned"]]
    lines = [f"{'':<{width}}  {'  '.join(columns)}"]
    for name, row in zip(names, report["matrix"], strict=True):
        texts = ["-" if value is None else f"{sign * value:.4g}" for value, sign in zip(row, signs, strict=True)]
        cells = [f"{text:<{len(column)}}" for text, column in zip(texts, columns, strict=True)]
        lines.append(f"{name:<{width}}  {'  '.join(cells)}".rstrip())
    for figure, found in report["measures"].items():
        count = len(found["tasks"])
        average = [] if found["average"] is None else [f"average: {(-1 if found['turned'] else 1) * found['average']:.4g}"]
        moved = [f"{name.replace('_', ' ')}: {found[name]:+.4g}" for name in _STAGE_MEASURES[1:] if found[name] is not None]
        sign = ", sign of transfers turned: above 0 is a gain" if found["turned"] and moved else ""
        lines.append(f"{figure.replace('_', ' ')} ({count} task{'s' if count > 1 else ''}{sign}): {'; '.join([*average, *moved])}")
    return lines


def _first(rows: Sequence[str]) -> str:
    return f" ({', '.join(rows[:3])}{', ...' if len(rows) > 3 else ''})" if rows else ""


def _few(lines: list[str]) -> list[str]:
    return lines if len(lines) <= MAX_LINES else [*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} more"]


def _chance(p_value: float | None) -> str:
    return "not compared" if p_value is None else f"p {p_value:.2g} against the chosen"


def _interval(value: Mapping[str, Any]) -> str:
    return f"{value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})"


def _moved(one: Mapping[str, Any]) -> str:
    found = one["difference"]
    return f"{found['value']:+.4g} ({found['low']:+.4g} to {found['high']:+.4g}), p {one['adjusted_p']:.2g}"
