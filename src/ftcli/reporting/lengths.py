"""The lengths of texts as a picture: how many are how long, on a logarithmic axis."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ftcli.reporting.plot import COLOURS, FAINT, INK

BINS = 60


def draw_lengths(counts: Mapping[str, Mapping[int, int]], kind: str) -> bytes:
    """The picture as the bytes of an `svg` or `png` file; the same counts give the same bytes.

    Args:
        counts: for each unit, such as `characters`, how many texts have which length.
    """
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.hashsalt": "ftcli", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    buffer = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained", facecolor="white")
        axes = figure.subplots()
        longest = max(length for lengths in counts.values() for length in lengths)
        edges = np.geomspace(1, max(2, longest + 1), BINS)
        for colour, (unit, lengths) in zip(COLOURS, counts.items(), strict=False):
            values, weights = np.array(list(lengths)), np.array(list(lengths.values()))
            heights, _ = np.histogram(np.maximum(values, 1), bins=edges, weights=weights)
            axes.stairs(heights, edges, color=colour, linewidth=1.6, label=unit)
        axes.set_xscale("log")
        axes.set_xlabel("length of a text")
        axes.set_ylabel("texts")
        axes.set_ylim(bottom=0)
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        metadata = {"Date": None, "Creator": "ftcli"} if kind == "svg" else {"Software": "ftcli"}
        figure.savefig(buffer, format=kind, dpi=144, metadata=metadata)
    return buffer.getvalue()
