"""Curves for a page: small figures that stay readable at the width of a phone, in the page's own colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ftcli.reporting.found_run import FoundRun
from ftcli.reporting.page import Figure
from ftcli.reporting.plot import COLOURS, FAINT, INK, LOG_SCALE_FROM_RATIO, SMOOTH_FROM_POINTS, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]
WIDE, SMALL = (5.6, 3.4), (4.4, 2.4)
"""Inches: at the width of a phone letters of size 10 are still 9 pixels high."""
MARKERS = "osD^vP"
MAX_LABEL, SMALL_LEGEND = 28, 4


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    label: str
    points: Points
    kind: Literal["train", "evaluation"] = "train"
    colour: int | None = None
    """Index of a colour; None is the ink of the text."""


def line_figure(
    lines: Sequence[Line], ylabel: str, alt: str, *, xlabel: str = "step", is_small: bool = False, from_zero: bool = True
) -> Figure | None:
    """The curves in one figure; None where none has a point."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for line in lines:
            _draw_line(axes, line)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _scale(axes, from_zero)
        # On a small figure many lines would leave no room; the large one above it names the colours.
        if any(line.label for line in lines) and not (is_small and len(lines) > SMALL_LEGEND):
            _legend(axes, 1 if is_small else 2)

    return Figure(_svg(draw, SMALL if is_small else WIDE), alt, is_small)


def scatter_figure(points: Mapping[str, tuple[float, float]], best: Sequence[str], xlabel: str, ylabel: str, alt: str) -> Figure:
    """Named points; those in `best`, which no other beats in both, are joined by a line."""

    def draw(axes: Axes) -> None:
        front = sorted(points[name] for name in best)
        axes.plot(*zip(*front, strict=True), color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)))
        for index, (name, (x, y)) in enumerate(points.items()):
            filled = COLOURS[index % len(COLOURS)] if name in best else "none"
            axes.plot(
                [x], [y], MARKERS[index % len(MARKERS)], color=COLOURS[index % len(COLOURS)], markerfacecolor=filled, label=shortened(name)
            )
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(0.12)
        _legend(axes, 2)

    return Figure(_svg(draw, WIDE), alt)


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9, borderaxespad=0.2)


def shortened(name: str) -> str:
    """A name that fits in a legend: of a long one the beginning and the end.

    Example:
        >>> shortened("orders"), shortened("a-very-long-name-of-a-run-that-somebody-gave")
        ('orders', 'a-very-long-n...omebody-gave')
    """
    return name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL // 2 - 1]}...{name[-(MAX_LABEL // 2 - 2) :]}"


def _svg(draw: Any, size: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    style: dict[Any, Any] = {"svg.hashsalt": "ftcli", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    style |= {"axes.axisbelow": True, "text.parse_math": False}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    buffer = io.BytesIO()
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=size, layout="constrained", facecolor="none")
        axes = canvas.add_subplot()
        draw(axes)
        axes.set_facecolor("none")
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "ftcli"})
    text = buffer.getvalue().decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).replace(INK, "currentColor")


def _draw_line(axes: Axes, line: Line) -> None:
    colour = INK if line.colour is None else COLOURS[line.colour % len(COLOURS)]
    steps, values = [step for step, _ in line.points], [value for _, value in line.points]
    if line.kind == "evaluation":
        axes.plot(
            *(steps, values), color=colour, linewidth=1.3, linestyle=(0, (4, 2)), marker="o", markersize=4, label=shortened(line.label),
            clip_on=False,  # a point on the edge is seen whole
        )  # fmt: skip
        return
    if len(values) >= SMOOTH_FROM_POINTS:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        values = smoothed(values, len(values) / 60)
    axes.plot(steps, values, color=colour, linewidth=1.7, marker="o" if len(values) == 1 else None, label=shortened(line.label))


def _scale(axes: Axes, from_zero: bool) -> None:
    """From zero, or logarithmic where the smallest value could not be told from zero."""
    smallest, largest = axes.dataLim.y0, axes.dataLim.y1
    axes.margins(x=0.02)
    if smallest > 0 and largest / smallest >= LOG_SCALE_FROM_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    elif from_zero and smallest >= 0:
        # Above the highest point is room for its marker, even where all points are high and near each other.
        axes.set_ylim(0, 1.05 * largest if largest > 0 else None)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")


def run_figures(run: FoundRun) -> list[Figure]:
    """Losses per source; learning rate, gradient norm, throughput."""
    trains, evaluations = run.metrics.of_kind("train"), run.metrics.of_kind("evaluate")
    names = list(dict.fromkeys(name for record in [*trains, *evaluations] for name in record["sources"]))
    colour = {name: index for index, name in enumerate(names)}
    lines = [Line("train", series(trains, "loss"))]
    trained = [name for name in names if any(name in record["sources"] for record in trains)]
    lines += [Line(f"train: {name}", series(trains, "sources", name), colour=colour[name]) for name in trained if len(trained) > 1]
    held_out = {name: series(evaluations, "sources", name, "loss") for name in names}
    lines += [Line(f"held out: {name}", points, "evaluation", colour[name]) for name, points in held_out.items()]
    told = [f"{line.label} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines if line.points]
    found = [line_figure(lines, "loss, nats per target", f"losses over steps: {'; '.join(told)}")]
    for key, (label, unit) in SMALL_PANELS.items():
        points = [(step, unit * value) for step, value in series(trains, key)]
        alt = f"{label} over steps: {points[0][1]:.3g} at step {points[0][0]:.0f}, {points[-1][1]:.3g} at the end" if points else ""
        found.append(line_figure([Line("", points)], label, alt, is_small=True))
    return [figure for figure in found if figure is not None]


SMALL_PANELS = {
    "lr": ("learning rate", 1.0),
    "grad_norm": ("gradient norm", 1.0),
    "target_tokens_per_second": ("targets per second", 1.0),
    "memory_bytes": ("memory, GiB", 2.0**-30),
}
"""Key of a training record -> what it is, and the factor to the unit of the figure."""


def series(records: Sequence[Mapping[str, Any]], *keys: str) -> Points:
    """The finite numbers under `keys` by step, as they stood last where a step was recorded twice."""
    found: dict[float, float] = {}
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[float(record["step"])] = float(value)
    return sorted(found.items())
