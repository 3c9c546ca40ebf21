"""A learning-rate range test for people: a table with bars for the terminal, and a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.files import PARTIAL, said_when_disk_is_full
from ftcli.reporting.plot import COLOURS, FAINT, INK

if TYPE_CHECKING:
    from ftcli.training.lr_find import RateCurve

NUM_LINES = 24
BAR_WIDTH = 32
MARKS = {"suggestion": "suggested", "steepest": "steepest", "lowest": "lowest", "diverges": "diverges"}


def rate_table(curve: RateCurve) -> list[str]:
    """Lines of rate, smoothed loss and a bar between the least and the first loss, with the marked rates among them."""
    marks = {name: getattr(curve, name) for name in MARKS}
    nearest = {name: min(range(len(curve.lrs)), key=lambda i: abs(curve.lrs[i] / lr - 1)) for name, lr in marks.items() if lr is not None}
    every = max(1, -(-len(curve.lrs) // NUM_LINES))
    shown = sorted({*range(0, len(curve.lrs), every), *nearest.values()})
    low = min(curve.smoothed)
    high = max(curve.smoothed[0], low + 1e-9)
    lines = [f"{'lr':>9}  {'loss':>8}"]
    for index in shown:
        share = min(1.0, (curve.smoothed[index] - low) / (high - low))
        words = ", ".join(MARKS[name] for name, place in nearest.items() if place == index)
        bar = "#" * round(share * BAR_WIDTH)
        lines.append(f"{curve.lrs[index]:9.1e}  {curve.smoothed[index]:8.4f}  {bar:<{BAR_WIDTH}}  {words}".rstrip())
    return lines


def plot_rates(curve: RateCurve, output: Path) -> None:
    """Write the curve as a picture; SVG or PNG, as the suffix of `output` says. The same curve gives the same bytes of SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    kind = output.suffix.lstrip(".").lower()
    style: dict[Any, Any] = {"svg.hashsalt": "ftcli", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    buffer = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.plot(curve.lrs, curve.losses, color=FAINT, linewidth=0.8, alpha=0.5)
        axes.plot(curve.lrs, curve.smoothed, color=INK, linewidth=1.8, label="loss (smoothed)")
        for colour, (name, label) in zip(COLOURS, MARKS.items(), strict=False):
            if (lr := getattr(curve, name)) is not None:
                axes.axvline(lr, color=colour, linewidth=1.4, linestyle=(0, (4, 2)), label=f"{label} {lr:.1e}")
        axes.set_xscale("log")
        top = max(curve.smoothed[0], *curve.smoothed[: len(curve.smoothed) // 2])
        axes.set_ylim(top=min(max(curve.smoothed), 1.5 * top))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss, nats per target, batches made alike")
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left", frameon=False, fontsize=9)
        metadata = {"Date": None, "Creator": "ftcli"} if kind == "svg" else {"Software": "ftcli"}
        figure.savefig(buffer, format=kind, dpi=144, metadata=metadata)
    partial = output.with_name(f"{PARTIAL}{output.name}")
    with said_when_disk_is_full(output):
        partial.write_bytes(buffer.getvalue())
        partial.replace(output)
