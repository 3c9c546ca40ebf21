"""Rows of the task that stand in the training rows or in the documents: found before anything is trained, told, and kept out of prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.leakage import read_text
from ftcli.data.sources.file import File
from ftcli.evaluation.approaches.recipe import Comparison, FineTuning, Retrieval
from ftcli.evaluation.tasks.questions import listed_rows, question_key, shared_rows
from ftcli.files import write_text

if TYPE_CHECKING:
    from ftcli.evaluation.tasks.retrieve import Retrieve

Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Shared:
    """What the rows of the task have in common with what the approaches are given."""

    rows: dict[str, str] = field(default_factory=dict)
    """Rows of the task whose question is asked in a training row: where each stands, and where that one does."""
    num_rows: int = 0
    """Rows of the task."""
    documents: dict[str, int] = field(default_factory=dict)
    """By approach how many documents were left out, because they are rows of the task with their answers."""
    kept: dict[str, Retrieve] = field(default_factory=dict)
    """By approach its documents without them."""

    def sentences(self) -> list[str]:
        """What a reader must know before all figures; nothing where nothing is shared."""
        found = []
        if self.rows:
            found.append(
                f"{len(self.rows)} of {self.num_rows} rows of the task are asked in the training rows, too "
                f"({listed_rows([f'{where} in {other}' for where, other in self.rows.items()])}): a trained approach has seen their "
                "answers, and its figures look better than they are. Solved examples and the choice of a prompt leave them out."
            )
        found += [f"{name}: {count} documents are rows of the task with their answers, and are left out." for name, count in self._counts()]
        return found

    def _counts(self) -> list[tuple[str, int]]:
        return [(name, count) for name, count in self.documents.items() if count]

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "documents_left_out": self.documents}


def find_shared(comparison: Comparison, folder: Path) -> Shared:
    """What the task's rows share with training rows and documents; documents are written again without it.

    Raises:
        RequestError: rows, documents or the base's tokenizer cannot be read.
    """
    from ftcli.models.tokenizer import load_tokenizer

    rows, train = list(comparison.task.read_rows()), list(_training_rows(comparison))
    shared = shared_rows(comparison.task, rows, train, load_tokenizer(comparison.base))
    given_away = {question_key(_whole(row, where)) for where, row in rows}
    longest = max((len(_whole(row, where)) for where, row in rows), default=0)
    found = Shared(shared, len(rows))
    for approach in comparison.approaches:
        if isinstance(approach, Retrieval | FineTuning) and approach.retrieve is not None:
            left = _without(approach.retrieve, given_away, 2 * longest)
            found.documents[approach.name] = len(left[0])
            if left[0]:
                path = folder / "rows" / f"{approach.name}-documents.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for _, row in left[1]))
                found.kept[approach.name] = approach.retrieve.model_copy(update={"source": File(path=str(path))})
    return found


def _training_rows(comparison: Comparison) -> Iterator[Row]:
    for entry in comparison.train:
        if entry.source.kind != "self":  # what the base writes itself is not there yet
            yield from islice(entry.source.rows(), entry.limit)


def _whole(row: dict[str, Any], where: str) -> str:
    text = read_text(row, where)
    return f"{text.question}\n{text.answer}"


def _without(retrieve: Retrieve, given_away: set[str], longest: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """(documents that are rows of the task, the others)

    Args:
        longest: characters; longer documents are no rows.
    """
    left: list[Row] = []
    others: list[Row] = []
    for (where, row), document in zip(retrieve.source.rows(), retrieve.documents(), strict=True):
        is_row = len(document.text) <= longest and question_key(document.text) in given_away
        (left if is_row else others).append((where, row))
    return left, others
