"""The labels of a classifier in the report: a table of the worst of them, and the confusion matrix as a picture."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftcli.evaluation.classification import PREFIX
from ftcli.reporting.page import Block, Figure, Table

MAX_ROWS = 20
MAX_NAMED = 40
MAX_COUNTED = 15


def label_blocks(run_folder: Path) -> list[Block]:
    """Tables and pictures of every evaluation source of a classifier; none where there is none."""
    blocks: list[Block] = []
    for path in sorted(run_folder.glob(f"{PREFIX}*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        alt = f"confusion matrix of {report['source']}: rows are the truth, columns what was predicted"
        blocks += [_table(report), Figure(confusion_svg(report), alt)]
    return blocks


def _table(report: Mapping[str, Any]) -> Table:
    rows = sorted(report["classes"], key=lambda row: (row["f1"], -row["support"], row["label"]))
    cells = [
        [row["label"], *(f"{100 * row[name]:.1f} %" for name in ("precision", "recall", "f1")), str(row["support"])]
        for row in rows[:MAX_ROWS]
    ]
    title = f"the {MAX_ROWS} labels of lowest F1, of {len(rows)}" if len(rows) > MAX_ROWS else "label"
    return Table(str(report["source"]), [title, "precision", "recall", "F1", "examples"], cells, numbers_from=1)


def confusion_svg(report: Mapping[str, Any]) -> str:
    """How often each label (row) is taken for each other (column), as a share of the row; few labels are named and counted."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure as Canvas

    labels, counts = report["confusion"]["labels"], np.array(report["confusion"]["counts"], dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(10.0, 2.5 + 0.3 * min(len(labels), MAX_NAMED))
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ftcli", "svg.fonttype": "none", "text.parse_math": False, "font.size": 8}):
        figure = Canvas(figsize=(size + 1, size), layout="constrained", facecolor="none")
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("predicted")
        axes.set_ylabel("truth")
        places = list(range(len(labels))) if len(labels) <= MAX_NAMED else []
        axes.set_xticks(places, [labels[place] for place in places], rotation=90)
        axes.set_yticks(places, [labels[place] for place in places])
        for row, column in np.argwhere(counts > 0) if len(labels) <= MAX_COUNTED else ():
            ink = "white" if shares[row, column] > 0.6 else "black"
            axes.text(int(column), int(row), f"{counts[row, column]:.0f}", ha="center", va="center", color=ink)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
