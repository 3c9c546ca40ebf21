"""Several runs in one report: curves over each other, how their recipes differ, the same rows compared, cost against quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftcli.reporting.curves import SMALL_PANELS, Line, line_figure, scatter_figure, series
from ftcli.reporting.diagnosis.diagnose import diagnose
from ftcli.reporting.found_run import FoundRun
from ftcli.reporting.live import format_measure, is_metric
from ftcli.reporting.overview import recipe_lines
from ftcli.reporting.page import Block, Document, Items, Section, Table, Text, Tone
from ftcli.reporting.rows_compared import PAIRED_HEADINGS, Key, before_and_after, loss_interval, paired, read_scores
from ftcli.units import format_seconds

Quality = tuple[str, str, float]
"""(source, measure, value)."""
Scores = Mapping[Key, Mapping[str, float]]
"""(source, metric) -> row -> score."""


def several_document(runs: Sequence[FoundRun]) -> Document:
    """Everything there is to say of runs beside each other; the others are compared with the first."""
    names = unique_names(runs)
    sections = [
        Section("Runs", _runs(runs, names)),
        Section("Diagnosis", _diagnoses(runs, names)),
        Section("Curves", _curves(runs, names)),
        Section("How the recipes differ", _differences(runs, names)),
        Section("The same rows compared", _paired(runs, names)),
        Section("Measures", _measures(runs, names)),
        Section("Quality against cost", _pareto(runs, names)),
    ]
    tone: Tone = "good" if all(run.state == "finished" for run in runs) else "soft"
    states = {run.state for run in runs}
    state = states.pop() if len(states) == 1 else "mixed"
    return Document(f"{len(runs)} runs", state, tone, [verdict_line(runs, names)], sections)


def unique_names(runs: Sequence[FoundRun]) -> list[str]:
    """A name for each run, with its place where two have the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]


def verdict_line(runs: Sequence[FoundRun], names: Sequence[str]) -> str:
    """Which run is best by its main measure, and whether the rows show it."""
    judged = {name: quality for run, name in zip(runs, names, strict=True) if (quality := quality_of(run, _shared(runs))) is not None}
    if len(judged) < 2:
        return "There is no measure that two of the runs have."
    source, measure, _ = next(iter(judged.values()))
    sign = 1 if is_metric(measure) else -1
    best = max(judged, key=lambda name: sign * judged[name][2])
    shown = ", ".join(f"{name} {format_measure(measure, value)}" for name, (_, _, value) in judged.items())
    return f"Best {measure.replace('_', ' ')} on {source}: {best} ({shown})."


def _shared(runs: Sequence[FoundRun]) -> list[tuple[str, str]]:
    """(source, measure) that all finished runs have, metrics first, then losses; retained sources last."""
    found: list[list[tuple[str, str]]] = []
    for run in runs:
        if run.after:
            found.append([(source, key) for source, values in run.after.items() for key in values if _is_number(values[key])])
    if not found:
        return []
    shared = [pair for pair in found[0] if all(pair in other for other in found[1:])]
    retained = {source for run in runs for source, values in run.after.items() if values.get("role") == "retained"}
    wanted = [pair for pair in shared if pair[1] == "loss" or (is_metric(pair[1]) and pair[1] not in _SIDE_MEASURES)]
    return sorted(wanted, key=lambda pair: (pair[0] in retained, not is_metric(pair[1])))


_SIDE_MEASURES = frozenset({"stopped_ratio", "unanimous_ratio"})


def quality_of(run: FoundRun, shared: Sequence[tuple[str, str]]) -> Quality | None:
    """The run's main measure: the first that all have."""
    if not shared or not run.after:
        return None
    source, measure = shared[0]
    value = run.after.get(source, {}).get(measure)
    return (source, measure, float(value)) if isinstance(value, int | float) else None


def _runs(runs: Sequence[FoundRun], names: Sequence[str]) -> list[Block]:
    rows = []
    for run, name in zip(runs, names, strict=True):
        seconds = format_seconds(run.seconds) if run.seconds is not None else "-"
        passed = sum(bool(proof.get("passed")) for proof in run.proofs)
        rows.append([name, run.state, f"{run.method} on {run.base}", str(run.step), seconds, f"{passed} of {len(run.proofs)}"])
    return [Table("The runs", ["run", "state", "method and base", "steps", "time", "proofs passed"], rows, numbers_from=3, is_narrow=True)]


def _diagnoses(runs: Sequence[FoundRun], names: Sequence[str]) -> list[Block]:
    rows = []
    for run, name in zip(runs, names, strict=True):
        findings = diagnose(run).findings
        rows += [[name, finding.name, finding.sentence] for finding in findings] or [[name, "-", "nothing found"]]
    return [Table("What is wrong with each run", ["run", "finding", "what"], rows)]


def _curves(runs: Sequence[FoundRun], names: Sequence[str]) -> list[Block]:
    trains = [run.metrics.of_kind("train") for run in runs]
    figures = [
        line_figure(
            [Line(name, series(records, "loss"), colour=index) for index, (name, records) in enumerate(zip(names, trains, strict=True))],
            "training loss, nats per target",
            f"training losses of {', '.join(names)} over steps",
        )
    ]
    for source in dict.fromkeys(source for run in runs for source in run.after):
        lines = [
            Line(name, series(run.metrics.of_kind("evaluate"), "sources", source, "loss"), "evaluation", index)
            for index, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        figures.append(line_figure(lines, f"held-out loss, {source}", f"held-out losses on {source} over steps", is_small=True))
    for key, (label, unit) in SMALL_PANELS.items():
        lines = [
            Line(name, [(step, unit * value) for step, value in series(records, key)], colour=index)
            for index, (name, records) in enumerate(zip(names, trains, strict=True))
        ]
        figures.append(line_figure(lines, label, f"{label} of each run over steps", is_small=True))
    return [figure for figure in figures if figure is not None]


def _differences(runs: Sequence[FoundRun], names: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    for run, name in zip(runs[1:], names[1:], strict=True):
        blocks += [Text(f"{names[0]} to {name}:"), Items(recipe_lines(runs[0], run))]
    return blocks


def _paired(runs: Sequence[FoundRun], names: Sequence[str]) -> list[Block]:
    scores = [before_and_after(read_scores(run.path))[1] for run in runs]
    rows: list[list[str]] = []
    untold: list[str] = []
    for name, found in zip(names[1:], scores[1:], strict=True):
        compared = paired(scores[0], found)
        rows += [[name, *one.cells()] for one in compared]
        untold += [] if compared else [_why_unpaired(scores[0], found, (names[0], name))]
    blocks: list[Block] = []
    if rows:
        caption = f"Against {names[0]}, row by row: McNemar's exact test or a sign-flip permutation, Holm's correction"
        blocks.append(Table(caption, ["run", *PAIRED_HEADINGS], rows, numbers_from=4))
    if untold:
        blocks += [Items(untold), Text(_KEPT_ROWS, is_soft=True)]
    return blocks


_KEPT_ROWS = (
    "Values of single rows are kept of evaluation sources with `generate`; of a loss only the mean and its standard error are. "
    "`ftcli eval RUN --against OTHER` compares losses, too, row by row."
)


def _why_unpaired(first: Scores, second: Scores, names: tuple[str, str]) -> str:
    """Why there is nothing to compare row by row."""
    without = [name for name, scores in zip(names, (first, second), strict=True) if not scores]
    if without:
        reason = f"{' and '.join(without)} kept no values of single rows"
    elif not set(first) & set(second):
        reason = "they measured no metric of the same source"
    else:
        reason = "they measured other rows"
    return f"{names[1]} is not compared with {names[0]} row by row: {reason}."


def _measures(runs: Sequence[FoundRun], names: Sequence[str]) -> list[Block]:
    rows = []
    for source, key in dict.fromkeys((source, key) for run in runs for source, values in run.after.items() for key in values):
        measured = [run.after.get(source, {}) for run in runs]
        if key not in ("role", "loss_error") and any(_is_number(values.get(key)) for values in measured):
            rows.append([source, key.replace("_", " "), *(_shown(key, values) for values in measured)])
    caption = "The last value of every measure; of a loss with its 95 % interval"
    return [Table(caption, ["source", "measure", *names], rows, numbers_from=2)] if rows else []


def _shown(key: str, values: Mapping[str, Any]) -> str:
    value, error = values.get(key), values.get("loss_error")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-"
    if key == "loss" and isinstance(error, float) and error > 0:
        return f"{value:.4f} ({loss_interval(value, error)})"
    return f"{value:,}" if key in ("targets", "examples") else format_measure(key, float(value))


def _pareto(runs: Sequence[FoundRun], names: Sequence[str]) -> list[Block]:
    shared = _shared(runs)
    judged = {name: quality for run, name in zip(runs, names, strict=True) if (quality := quality_of(run, shared)) is not None}
    if len(judged) < 2:
        return []
    source, measure, _ = next(iter(judged.values()))
    sign = 1 if is_metric(measure) else -1
    costs: dict[str, dict[str, float]] = {
        "seconds in steps": {name: run.seconds for run, name in zip(runs, names, strict=True) if run.seconds},
        "numbers that train": {name: count for run, name in zip(runs, names, strict=True) if (count := _trainable(run))},
    }
    for kept in dict.fromkeys(pair[0] for pair in shared if _is_retained(runs, pair[0])):
        losses = {name: run.after[kept]["loss"] for run, name in zip(runs, names, strict=True) if kept in run.after}
        costs[f"loss on {kept} (retained)"] = losses
    label = f"{measure.replace('_', ' ')} on {source}"
    figures: list[Block] = []
    for cost, values in costs.items():
        points = {name: (values[name], judged[name][2]) for name in judged if name in values}
        if len(points) > 1 and len(set(values.values())) > 1:
            best = pareto_front({name: (x, sign * y) for name, (x, y) in points.items()})
            alt = f"{label} against {cost}; not beaten in both: {', '.join(best)}"
            figures.append(scatter_figure(points, best, cost, label, alt))
            figures.append(Text(f"Not beaten in both {cost} and {label}: {', '.join(best)}.", is_soft=True))
    return figures


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those that no other beats: none is cheaper and as good, or better and as cheap.

    Args:
        points: name -> (cost, quality); less cost and more quality are better.

    Example:
        >>> pareto_front({"a": (1.0, 0.5), "b": (2.0, 0.9), "c": (3.0, 0.8)})
        ['a', 'b']
    """

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] >= other[1]

    return [name for name, point in points.items() if not any(beats(other, point) for other in points.values())]


def _trainable(run: FoundRun) -> float | None:
    parameters = run.manifest.get("parameters")
    value = parameters.get("trainable") if isinstance(parameters, Mapping) else None
    return float(value) if _is_number(value) else None  # type: ignore[arg-type]


def _is_retained(runs: Sequence[FoundRun], source: str) -> bool:
    return any(run.after.get(source, {}).get("role") == "retained" for run in runs)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
