"""Runs as lines of text and as plain data: a list of them, one of them, several beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftcli.errors import FtcliError
from ftcli.reporting.diagnosis.diagnose import diagnose
from ftcli.reporting.found_run import RESOLVED_RECIPE, FoundRun
from ftcli.reporting.live import evaluation_table, format_measure, is_metric, plain_table
from ftcli.units import format_bytes, format_count, format_seconds

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.-~=+*#"
SPARKLINE_WIDTH = 60
MISSING = "-"


def summary_of(run: FoundRun) -> dict[str, Any]:
    """What a list of runs tells of one, as plain data."""
    return {
        "name": run.name,
        "path": str(run.path),
        "status": run.state,
        "method": run.method,
        "base": run.base,
        "step": run.step,
        "num_steps": run.num_steps,
        "loss": run.last_loss,
        "evaluation": run.after or run.before,
        "changed": run.changed,
        "damage": list(run.damage),
    }


def list_lines(runs: Sequence[FoundRun], folder: Path, now: float) -> list[str]:
    """A table of runs.

    Args:
        folder: run names are shown as paths in it.
        now: seconds since the epoch.
    """
    rows = []
    for run in runs:
        steps = f"{run.step}/{run.num_steps if run.num_steps is not None else '?'}"
        name = str(run.path.relative_to(folder)) if run.path != folder else str(run.path)
        loss = format_measure("loss", run.last_loss)
        rows.append([name, run.state, run.method, run.base, steps, loss, _evaluation_text(run), format_age(run.changed, now)])
    return plain_table(["run", "status", "method", "base", "steps", "loss", "evaluation", "changed"], rows, left=(0, 1, 2, 3, 6, 7))


def _evaluation_text(run: FoundRun) -> str:
    """The last measure of each source that says most: its first metric, or its loss."""
    parts = []
    for name, values in (run.after or run.before).items():
        measure = next((key for key in values if is_metric(key)), "loss")
        if isinstance(value := values.get(measure), int | float):
            parts.append(f"{name} {measure} {format_measure(measure, value)}")
    return ", ".join(parts) or MISSING


def format_age(then: float | None, now: float) -> str:
    """How long ago something was, roughly.

    Example:
        >>> format_age(0.0, 5.0), format_age(0.0, 7200.0), format_age(0.0, 200000.0), format_age(None, 0.0)
        ('just now', '2 h ago', '2 days ago', '-')
    """
    if then is None:
        return MISSING
    seconds = max(0.0, now - then)
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {'day' if unit == 'days' and count == 1 else unit} ago"
    return "just now"


def details_of(run: FoundRun) -> dict[str, Any]:
    """Everything that is known of one run, as plain data."""
    return {
        **summary_of(run),
        "before": run.before,
        "after": run.after,
        "proofs": run.proofs,
        "diagnosis": diagnose(run).to_json(),
        "data": run.data,
        "environment": run.environment,
        "files": dict(_files(run.path)),
        "recipe": run.recipe,
    }


def show_lines(run: FoundRun, now: float, blocks: str = BLOCKS) -> list[str]:
    """One run: how it stands, losses, evaluation, data, proofs, files."""
    steps = f"{run.step} of {run.num_steps if run.num_steps is not None else '?'}"
    facts = {
        "run": f"{run.name} ({run.path})",
        "status": f"{run.state}, last changed {format_age(run.changed, now)}",
        "method": f"{run.method} on {run.base}",
        "steps": steps + (f" in {format_seconds(run.seconds)}" if run.seconds is not None else ""),
        "layout": _layout(run),
    }
    lines = [f"{key:<8}{value}" for key, value in facts.items() if value]
    lines += [f"{'damage':<8}{text}" for text in run.damage]
    lines += _block("loss", _loss_lines(run, blocks))
    rows = [row.cells() for row in evaluation_table(run.before, run.after)]
    lines += _block("evaluation", plain_table(["source", "measure", "before", "after", "change"], rows, left=(0, 1)) if rows else [])
    lines += _block("diagnosis", diagnose(run).lines())
    lines += _block("data", _data_lines(run))
    proofs = [f"{'passed' if proof.get('passed') else 'FAILED'}  {proof.get('name')}: {proof.get('detail')}" for proof in run.proofs]
    lines += _block("proofs", proofs)
    files = [[name, format_bytes(size)] for name, size in _files(run.path)]
    return lines + _block("files", plain_table(["name", "size"], files) if files else [])


def sparkline(values: Sequence[float], width: int = SPARKLINE_WIDTH, blocks: str = BLOCKS) -> str:
    """The course of `values` in one line: each character is the mean of a stretch of them, from the lowest to the highest.

    Example:
        >>> sparkline([8.0, 6.0, 4.0, 2.0, 1.0])
        '█▆▄▂▁'
    """
    width = min(width, len(values))
    means = []
    for column in range(width):
        stretch = values[column * len(values) // width : (column + 1) * len(values) // width]
        means.append(sum(stretch) / len(stretch))
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((value - low) * scale)] for value in means)


def _loss_lines(run: FoundRun, blocks: str) -> list[str]:
    losses = [record["loss"] for record in run.metrics.of_kind("train") if isinstance(record.get("loss"), int | float)]
    finite = [loss for loss in losses if abs(loss) < float("inf")]
    if not finite:
        return []
    return [f"{finite[0]:.4f} {sparkline(finite, blocks=blocks)} {finite[-1]:.4f}"]


def _layout(run: FoundRun) -> str:
    layout = run.manifest.get("layout")
    return f"{layout.get('layout')} ({layout.get('reason')})" if isinstance(layout, Mapping) else ""


def _data_lines(run: FoundRun) -> list[str]:
    keys = ("rows_read", "num_examples", "num_tokens", "num_targets", "num_overlong")
    rows = []
    for report in run.data:
        dropped = report.get("dropped")
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) if isinstance(dropped, Mapping) else ""
        counts = [format_count(report[key]) if isinstance(report.get(key), int) else MISSING for key in keys]
        names = [str(report.get(key, MISSING)) for key in ("name", "use", "format")]
        rows.append([*names, *counts, reasons or "0"])
    headings = ["source", "use", "format", "rows", "examples", "tokens", "targets", "overlong", "dropped"]
    return plain_table(headings, rows, left=(0, 1, 2, 8)) if rows else []


def _block(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)] if lines else []


def _files(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of what a run folder holds; of a folder, all that is in it."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.name.startswith("."):
            inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            found.append((path.name + ("/" if path.is_dir() else ""), sum(_size(file) for file in inside)))
    return found


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        # a checkpoint may be removed by its run while it is looked at
        return 0


def comparison_of(runs: Sequence[FoundRun]) -> dict[str, Any]:
    """How the recipes of runs differ from the first one's, and their last metrics, as plain data."""
    differences = {str(run.path): recipe_lines(runs[0], run) for run in runs[1:]}
    return {"runs": [summary_of(run) for run in runs], "differences": differences, "metrics": _metrics_table(runs)}


def compare_lines(runs: Sequence[FoundRun]) -> list[str]:
    """The comparison as text."""
    lines = []
    for run in runs[1:]:
        lines += [f"{runs[0].path} -> {run.path}", *(f"  {line}" for line in recipe_lines(runs[0], run)), ""]
    rows = [[label, *map(_plain, values)] for label, values in _metrics_table(runs).items()]
    return lines + plain_table(["", *(str(run.path) for run in runs)], rows)


def recipe_lines(old: FoundRun, new: FoundRun) -> list[str]:
    """One line for each key in which two recipes differ; what runs are called and where they lie is no difference."""
    from ftcli.recipe.load import load_recipe
    from ftcli.recipe.write import recipe_difference

    recipes = []
    for run in (old, new):
        try:
            recipes.append(load_recipe(run.path / RESOLVED_RECIPE).recipe)
        except FtcliError as error:
            return [f"the recipe of {run.path} cannot be compared: {error.summary}"]
    ours = {"name": recipes[0].name, "output": recipes[0].output}
    return recipe_difference(recipes[0], recipes[1].model_copy(update=ours)) or ["the recipes are equal"]


def _metrics_table(runs: Sequence[FoundRun]) -> dict[str, list[Any]]:
    """For each measure its last value in each run, None where a run has none."""
    table: dict[str, list[Any]] = {
        "status": [run.state for run in runs],
        "steps": [run.step for run in runs],
        "seconds": [run.seconds for run in runs],
        "loss": [run.last_loss for run in runs],
    }
    measures = dict.fromkeys((source, key) for run in runs for source, values in run.after.items() for key in values)
    for source, key in measures:
        values = [run.after.get(source, {}).get(key) for run in runs]
        if key != "role":
            table[f"{source} {key}"] = values
    return table


def _plain(value: object) -> str:
    if value is None:
        return MISSING
    return f"{value:.4f}" if isinstance(value, float) else str(value)
