"""The table of a classifier's labels and its confusion matrix, for each evaluation source a file in the run folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.files import write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ftcli.objectives import Objective

PREFIX = "classification-"


def report_path(folder: Path, source: str) -> Path:
    """Where the report of an evaluation source lies."""
    return folder / f"{PREFIX}{re.sub(r'[^A-Za-z0-9._-]+', '-', source)}.json"


def write_class_report(
    folder: Path, source: str, objective: Objective, scores: NDArray[np.float64], labels: NDArray[np.float64]
) -> Path | None:
    """Write what the last evaluation of `source` says of each label; None where examples do not have one label each.

    Args:
        scores: ``(N, C)`` probabilities.
        labels: ``(N, 1)`` the index of the right label; beyond the last are texts out of scope, which are left out.
    """
    from ftcli.metrics.classification import report
    from ftcli.objectives.classification import Classification

    if not isinstance(objective, Classification) or objective.task != "single":
        return None
    truth = labels[:, 0].astype(int)
    inside = truth < len(objective.class_labels)
    path = report_path(folder, source)
    write_json(path, {"source": source, **report(scores[inside], truth[inside], objective.class_labels)})
    return path
