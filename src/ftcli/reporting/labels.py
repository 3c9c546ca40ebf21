"""The labels of a classifier in the report: a table of the worst of them, and the confusion matrix as a picture."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ftcli.evaluation.classification import PREFIX

MAX_ROWS = 20
MAX_NAMED = 40
MAX_COUNTED = 15


def label_section(run_folder: Path) -> str:
    """Tables and pictures of every evaluation source of a classifier, as HTML; empty where there is none."""
    parts = []
    for path in sorted(run_folder.glob(f"{PREFIX}*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"<h3>{escape(str(report['source']))}</h3>{_table(report)}<figure>{confusion_svg(report)}</figure>")
    return "\n".join(parts)


def _table(report: Mapping[str, Any]) -> str:
    rows = sorted(report["classes"], key=lambda row: (row["f1"], -row["support"], row["label"]))
    body = "".join(
        f"<tr><td>{escape(row['label'])}</td>"
        + "".join(f"<td>{100 * row[name]:.1f} %</td>" for name in ("precision", "recall", "f1"))
        + f"<td>{row['support']}</td></tr>"
        for row in rows[:MAX_ROWS]
    )
    title = f"the {MAX_ROWS} labels of lowest F1, of {len(rows)}" if len(rows) > MAX_ROWS else "label"
    head = "".join(f"<th>{name}</th>" for name in (title, "precision", "recall", "F1", "examples"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def confusion_svg(report: Mapping[str, Any]) -> str:
    """How often each label (row) is taken for each other (column), as a share of the row; few labels are named and counted."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    labels, counts = report["confusion"]["labels"], np.array(report["confusion"]["counts"], dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(10.0, 2.5 + 0.3 * min(len(labels), MAX_NAMED))
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ftcli", "svg.fonttype": "none", "text.parse_math": False, "font.size": 8}):
        figure = Figure(figsize=(size + 1, size), layout="constrained", facecolor="none")
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
