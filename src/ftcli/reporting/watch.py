"""A run as text that fits a terminal: how it stands, and a chart for each thing that is measured on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ftcli.reporting.found_run import FoundRun
from ftcli.reporting.live import format_evaluation_line
from ftcli.reporting.overview import format_age
from ftcli.units import format_seconds

BLOCKS, PLAIN_BLOCKS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
MIN_CHART_ROWS, MAX_CHART_ROWS = 2, 8
MARGIN = 12
"""Columns for the numbers beside a chart."""

Points = list[tuple[float, float]]
"""(step, value)."""


def watch_lines(run: FoundRun, now: float, width: int, height: int, blocks: str = BLOCKS) -> list[str]:
    """The run in at most `height` lines of at most `width` characters."""
    head = _head(run, now)
    charts = series_of(run)
    evaluations = run.metrics.of_kind("evaluate")
    tail = [format_evaluation_line({**evaluations[-1], "num_steps": run.num_steps})] if evaluations else []
    room = height - len(head) - len(tail) - 1
    # The first charts are what people look for; on a small terminal the rest is left out.
    shown = dict(list(charts.items())[: max(1, room // (MIN_CHART_ROWS + 1))])
    rows = min(MAX_CHART_ROWS, max(MIN_CHART_ROWS, room // max(1, len(shown)) - 1))
    lines = [line for name, points in shown.items() for line in [name, *chart(points, width - MARGIN, rows, blocks)]]
    return [line[:width] for line in [*head, *lines, *tail]][:height]


def _head(run: FoundRun, now: float) -> list[str]:
    steps = f"step {run.step} of {run.num_steps if run.num_steps is not None else '?'}"
    trains = run.metrics.of_kind("train")
    left = ""
    if run.state == "running" and trains and run.num_steps and isinstance(seconds := trains[-1].get("seconds"), int | float):
        left = f", about {format_seconds(seconds / trains[-1]['step'] * (run.num_steps - trains[-1]['step']))} left"
    facts = [f"{run.name}: {run.state}, {steps}{left}, last changed {format_age(run.changed, now)}", f"{run.method} on {run.base}"]
    return [*facts, *(f"damage: {text}" for text in run.damage), ""]


def series_of(run: FoundRun) -> dict[str, Points]:
    """What there is a curve of: the loss of every source, evaluation losses, learning rate, gradient norm, targets per second."""
    trains, evaluations = run.metrics.of_kind("train"), run.metrics.of_kind("evaluate")
    sources = list(dict.fromkeys(name for record in trains for name in _mapping(record.get("sources"))))
    held_out = list(dict.fromkeys(name for record in evaluations for name in _mapping(record.get("sources"))))
    found = {f"training loss, {name}": _points(trains, "sources", name) for name in sources}
    found |= {f"evaluation loss, {name}": _points(evaluations, "sources", name, "loss") for name in held_out}
    for key, name in (("grad_norm", "gradient norm"), ("lr", "learning rate"), ("target_tokens_per_second", "targets per second")):
        found[name] = _points(trains, key)
    return {name: points for name, points in found.items() if len(points) > 1}


def _points(records: Sequence[Mapping[str, Any]], *keys: str) -> Points:
    """The finite numbers under `keys`, by step."""
    points = []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((float(record["step"]), float(value)))
    return points


def chart(points: Points, width: int, height: int, blocks: str = BLOCKS) -> list[str]:
    """`points` as columns of blocks, with the highest and the lowest value beside them; few points make a narrow chart.

    Example:
        >>> [line.rstrip() for line in chart([(1, 0.0), (2, 1.0), (3, 2.0)], 3, 2)]
        ['        2 | ▁█', '        0 |▁██']
    """
    # No wider than there are points: the rest would be drawn of what was never measured.
    columns = _columns(points, max(1, min(width, len(points))))
    values = [value for value in columns if value is not None]
    low, high = min(values), max(values)
    levels = height * (len(blocks) - 1)
    scale = (levels - 1) / (high - low) if high > low else 0.0
    heights = [0 if value is None else 1 + round((value - low) * scale) for value in columns]
    lines = []
    for row in range(height - 1, -1, -1):
        floor = row * (len(blocks) - 1)
        drawn = "".join(blocks[min(len(blocks) - 1, max(0, filled - floor))] for filled in heights)
        label = f"{high:.4g}" if row == height - 1 else (f"{low:.4g}" if row == 0 else "")
        lines.append(f"{label:>9} |{drawn}")
    return lines


def _columns(points: Points, width: int) -> list[float | None]:
    """The mean of each column's points, the last one's where a column has none."""
    first, last = points[0][0], points[-1][0]
    width = width if last > first else 1
    sums: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        place = 0 if last == first else min(width - 1, int((step - first) / (last - first) * width))
        sums[place].append(value)
    columns: list[float | None] = []
    for found in sums:
        columns.append(sum(found) / len(found) if found else (columns[-1] if columns else None))
    return columns


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
