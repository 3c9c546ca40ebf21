"""The labels of a source's rows, counted and checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ftcli.errors import DataError, Problem

if TYPE_CHECKING:
    from ftcli.data.store import TreeStore

_LISTED = 10


def count_labels(task: str, stores: Sequence[TreeStore]) -> Counter[str]:
    """How many rows have each label; empty for a regression.

    Raises:
        DataError: a row has not as many labels as the task asks for, or a label that is no number.
    """
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    for store in stores:
        for index in range(len(store)):
            labels = store.labels(index) or ()
            problem = _problem(task, labels)
            if problem is not None:
                problems.append(Problem(store.where(index), *problem))
            if task != "regression":
                counts.update(set(labels))
    if problems:
        more = f"; the first {_LISTED} of {len(problems)} rows" if len(problems) > _LISTED else ""
        raise DataError(f"the labels do not fit `objective.task: {task}`{more}", problems[:_LISTED])
    return counts


def _problem(task: str, labels: tuple[str, ...]) -> tuple[str, str] | None:
    if task == "multi":
        return None
    if len(labels) != 1:
        return f"has {len(labels)} labels, not one", "`objective.task: multi` takes any number of them"
    if task == "regression" and not _is_number(labels[0]):
        return f"the label `{labels[0]}` is not a number", "`objective.task: single` takes names"
    return None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_evaluation(task: str, stores: Sequence[TreeStore], labels: Collection[str], outside: str | None, unseen: str) -> None:
    """Refuse labels in the evaluation data that are not trained, unless they are to count as wrong.

    Args:
        labels: what is trained.
        outside: what a text without a label is called, which is never trained.
        unseen: `error` or `count-as-wrong`.

    Raises:
        DataError: there are such labels, or no row of a source has any other.
    """
    for store in stores:
        counts = count_labels(task, [store])
        strange = sorted(set(counts) - set(labels) - {outside})
        if strange and unseen == "error":
            shown = ", ".join(f"`{label}` ({counts[label]})" for label in strange[:_LISTED])
            more = f", ... and {len(strange) - _LISTED} more" if len(strange) > _LISTED else ""
            hint = "train on rows with them, or `objective.unseen_labels: count-as-wrong`"
            raise DataError("evaluation has labels that training never saw", [Problem(store.name, shown + more, hint)])
        if counts and not set(counts) & set(labels):
            raise DataError("evaluation cannot measure anything", [Problem(store.name, "no row has a label that is trained")])
