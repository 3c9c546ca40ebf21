"""What held a run near where it began: the nats that each regularizer adds to the loss, as a table and a curve each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftcli.reporting.curves import Line, line_figure, series
from ftcli.reporting.found_run import FoundRun
from ftcli.reporting.page import Block, Table

HEADINGS = ("regularizer", "how", "weight", "nats at first", "at most", "at last", "share of the loss at last")
_NOT_HOW = ("kind", "weight")


def holding_blocks(run: FoundRun) -> list[Block]:
    """A row and a small figure for each regularizer; none for a run without."""
    records = run.metrics.of_kind("train")
    found = {name: series(records, "regularizers", name) for name in dict.fromkeys(name for r in records for name in _held(r))}
    settings, loss = settings_by_name(run.recipe), run.last_loss
    total = sum(points[-1][1] for points in found.values() if points)
    rows, figures = [], []
    for name, points in found.items():
        if not points:
            continue
        values, own = [value for _, value in points], settings.get(name, {})
        share = f"{values[-1] / (loss + total):.1%}" if loss is not None and loss + total > 0 else "-"
        numbers = [f"{value:.4g}" for value in (values[0], max(values), values[-1])]
        rows.append([name, _how(own), str(own.get("weight", "default")), *numbers, share])
        alt = f"what {name} adds to the loss over steps: {values[0]:.3g} at step {points[0][0]:.0f}, {values[-1]:.3g} at the end"
        figures.append(line_figure([Line("", points)], f"{name}, nats a target", alt, is_small=True))
    if not rows:
        return []
    table = Table("What each regularizer adds to the loss, in nats per target", HEADINGS, rows, numbers_from=2)
    return [table, *(figure for figure in figures if figure is not None)]


def settings_by_name(recipe: Mapping[str, Any]) -> dict[str, Mapping[Any, Any]]:
    """The settings of each regularizer under the name that logs give it: its kind, with its place where the kind is there twice."""
    objective = recipe.get("objective")
    listed = objective.get("regularize") if isinstance(objective, Mapping) else None
    wanted = [(index, own) for index, own in enumerate(listed if isinstance(listed, list) else []) if isinstance(own, Mapping)]
    # What has no weight is not at work, and the names of the others are as if it were not there.
    at_work = [(index, own) for index, own in wanted if own.get("weight") != 0]
    kinds = [str(own.get("kind")) for _, own in at_work]
    return {(kind if kinds.count(kind) == 1 else f"{kind}.{index}"): own for (index, own), kind in zip(at_work, kinds, strict=True)}


def _held(record: Mapping[str, Any]) -> Mapping[str, Any]:
    held = record.get("regularizers")
    return held if isinstance(held, Mapping) else {}


def _how(own: Mapping[Any, Any]) -> str:
    """The settings in a few words, without what is not set."""
    said = []
    for key, value in own.items():
        # In YAML 1.1 a key `on` without quotes is the word for true.
        name = "on" if key is True else str(key).replace("_", " ")
        if name not in _NOT_HOW and value is not None and value is not False:
            said.append(name if value is True or isinstance(value, Mapping | list) else f"{name} {value}")
    return ", ".join(said)
