"""The losses of a run as a picture: training and evaluation per source above, the learning rate below."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.files import PARTIAL, said_when_disk_is_full
from ftcli.reporting.found_run import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#2b2f36"
FAINT = "#8a919c"
# Readable on white and on black, and told apart by colour-blind readers. Source: Okabe and Ito 2008, the lighter yellow left out.
COLOURS = ("#1b84c7", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
SMOOTH_FROM_POINTS = 20
LOG_SCALE_FROM_RATIO = 50.0

Record = Mapping[str, Any]


def plot_losses(metrics_file: Path, output: Path) -> None:
    """Write the losses of metrics.jsonl as a picture; SVG or PNG, as the suffix of `output` says.

    The same metrics give the same bytes of SVG.
    """
    records = read_metrics(metrics_file).records
    picture = draw(records, output.suffix.lstrip(".").lower(), background="white")
    partial = output.with_name(f"{PARTIAL}{output.name}")
    with said_when_disk_is_full(output):
        partial.write_bytes(picture)
        partial.replace(output)


def inline_svg(records: Sequence[Record]) -> str:
    """The same picture as an SVG element for a page: no background, and lines and text in the page's own colour."""
    text = draw(records, "svg", background="none").decode()
    without_metadata = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return without_metadata.replace(INK, "currentColor")


def draw(records: Sequence[Record], kind: str, background: str) -> bytes:
    """The picture as the bytes of an `svg` or `png` file."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.hashsalt": "ftcli", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    # a source's name is a name: a dollar sign in it begins no formula
    style |= {"axes.axisbelow": True, "text.parse_math": False}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    buffer = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 5.2), layout="constrained", facecolor=background)
        _draw_panels(figure, records)
        metadata = {"Date": None, "Creator": "ftcli"} if kind == "svg" else {"Software": "ftcli"}
        figure.savefig(buffer, format=kind, dpi=144, metadata=metadata)
    return buffer.getvalue()


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Each value as a mean of itself and its neighbours on both sides, weights falling by e every `span` values.

    Example:
        >>> [round(value, 2) for value in smoothed([1.0, 0.0, 0.0], 2.0)]
        [0.51, 0.27, 0.19]
    """
    decay = math.exp(-1 / span)
    forward, backward = _decayed_sums(values, decay), _decayed_sums(values[::-1], decay)[::-1]
    return [
        (before + after - value) / (weight_before + weight_after - 1)
        for value, (before, weight_before), (after, weight_after) in zip(values, forward, backward, strict=True)
    ]


def _decayed_sums(values: Sequence[float], decay: float) -> list[tuple[float, float]]:
    """For each value, (sum, weight) of it and those before it, every one decayed by its distance."""
    sums, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        sums.append((total, weight))
    return sums


def _draw_panels(figure: Figure, records: Sequence[Record]) -> None:
    losses, rates = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1)})
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "evaluate"]
    colours = _colours(train, evaluations)
    _draw_train(losses, train, colours)
    _draw_evaluations(losses, evaluations, colours)
    steps, lr = _series(train, "lr")
    rates.plot(steps, lr, color=INK, linewidth=1.4)
    rates.set_xlabel("step")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    rates.margins(x=0.02)
    losses.set_ylabel("loss, nats per target")
    for axes in (losses, rates):
        axes.set_facecolor("none")
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels([losses, rates])
    if losses.get_legend_handles_labels()[0]:
        _scale(losses)
        losses.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=9, borderaxespad=0.2)
    else:
        losses.text(0.5, 0.5, "no step has been logged", transform=losses.transAxes, ha="center", color=FAINT)


def _colours(train: Sequence[Record], evaluations: Sequence[Record]) -> dict[str, str]:
    """One colour per source name: a source that is trained on and evaluated has the same in both."""
    names = dict.fromkeys(name for record in [*train, *evaluations] for name in record["sources"])
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


def _draw_train(axes: Axes, train: Sequence[Record], colours: Mapping[str, str]) -> None:
    steps, values = _series(train, "loss")
    if not steps:
        return
    if len(steps) < SMOOTH_FROM_POINTS:
        axes.plot(steps, values, color=INK, linewidth=1.8, label="train", marker="o" if len(steps) == 1 else None)
    else:
        axes.plot(steps, values, color=FAINT, linewidth=0.8, alpha=0.45)
        axes.plot(steps, smoothed(values, len(values) / 60), color=INK, linewidth=1.8, label="train (smoothed)")
    names = list(dict.fromkeys(name for record in train for name in record["sources"]))
    for name in names if len(names) > 1 else []:
        steps, values = _series([{"step": record["step"], "loss": record["sources"].get(name)} for record in train], "loss")
        lines = smoothed(values, len(values) / 60) if len(values) >= SMOOTH_FROM_POINTS else values
        axes.plot(steps, lines, color=colours[name], linewidth=1.1, alpha=0.9, label=f"train: {name}")


def _draw_evaluations(axes: Axes, evaluations: Sequence[Record], colours: Mapping[str, str]) -> None:
    for name in dict.fromkeys(name for record in evaluations for name in record["sources"]):
        mine = [{"step": record["step"], **record["sources"][name]} for record in evaluations if name in record["sources"]]
        # the best step is measured again at the end of a run that stopped early
        in_order = {record["step"]: record for record in sorted(mine, key=lambda record: int(record["step"]))}
        steps, values = _series(list(in_order.values()), "loss")
        label = f"evaluation: {name}" + (" (retained)" if mine[-1].get("role") == "retained" else "")
        axes.plot(steps, values, color=colours[name], linewidth=1.3, linestyle=(0, (4, 2)), marker="o", markersize=4.5, label=label)


def _series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """The steps at which `key` has a finite value, and the values."""
    points = [
        (record["step"], record[key]) for record in records if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _scale(axes: Axes) -> None:
    """From zero, or logarithmic where the smallest loss could not be told from zero."""
    smallest, largest = axes.dataLim.y0, axes.dataLim.y1
    if smallest > 0 and largest / smallest >= LOG_SCALE_FROM_RATIO:
        axes.set_yscale("log")
        # The scale's own labels are mathematical text, which is off so that names with a dollar sign stay names.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0 if smallest >= 0 else None)
