"""One task on one model, with what stands around the task itself: passages, ways to ask, groups of rows, and the rows that are clean.

Passages and ways to ask rewrite rows before the task reads them; groups and clean rows are parts of its figures. So every kind of
task has them without knowing of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ftcli.errors import DataError, Problem
from ftcli.evaluation.tasks.columns import column
from ftcli.evaluation.tasks.questions import question_key
from ftcli.evaluation.tasks.task import Figure, Subject, TaskResult
from ftcli.evaluation.tasks.variants import Division, RowList, Rows, Variant, Variants, asked, question_column, question_of_row, rephrased

if TYPE_CHECKING:
    from ftcli.evaluation.tasks import Task
    from ftcli.evaluation.tasks.retrieve_index import Passages
    from ftcli.evaluation.tasks.shots import Shots

MAX_GROUPS = 200
# Kept free for an answer that is no generated text: a choice, a markup's end.
ANSWER_TOKENS = 64
# Of what ends an answer among solved examples.
MARKUP_TOKENS = 8


class HasRows(Protocol):
    """A source, or whatever else gives rows."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]: ...


def check_task(task: Task, subject: Subject) -> None:
    """Read every row as `measure_task` will, and compute nothing.

    Raises:
        DataError: a row cannot be read, or there is none to choose a prompt on.
    """
    task.check(subject)
    shots: Shots | None = getattr(task, "shots", None)
    if shots is not None and shots.source is not None:
        task.prompts(list(shots.source.rows()), subject.tokenizer)
    if task.variants is not None:
        _divided(task, task.variants, subject)


def measure_task(task: Task, subject: Subject, *, trained_on: Sequence[HasRows] = (), cache: Path | None = None) -> TaskResult:
    """Every figure of a task, and its details.

    Args:
        trained_on: rows of the model's own training data, for `leakage` without `train`.
        cache: folder of kept passage indices.

    Raises:
        DataError: a row cannot be read.
    """
    if task.variants is None and task.retrieve is None:
        result = task.measure(subject)
    elif task.variants is None:
        result = posed(task, None, list(task.read_rows()), subject, _open(task, cache)).measure(subject)
    else:
        result = _measure_best(task, subject, _open(task, cache))
    if task.group_by is not None:
        result.details["groups"] = _groups(task, task.group_by, result)
    if task.leakage is not None:
        result.details["clean"] = _clean(task, task.leakage.train or trained_on, result)
    return result


def main_figure(task: Task, result: TaskResult) -> str:
    """The figure that models are compared by."""
    return task.main_figure or next(iter(result.figures))


def _open(task: Task, cache: Path | None) -> Passages | None:
    return None if task.retrieve is None else task.retrieve.open(cache)


def posed(task: Task, variant: Variant | None, rows: Rows, subject: Subject, passages: Passages | None) -> Task:
    """The task on rewritten rows: asked as `variant` says, with passages in front of the questions."""
    changes: dict[str, Any] = {"limit": None, "variants": None, "retrieve": None}
    shots = getattr(task, "shots", None)
    if variant is not None:
        rows = _rephrased(task, variant, rows)
        if shots is not None and shots.source is not None:
            listed = _rephrased(task, variant, list(shots.source.rows()))
            shots = shots.model_copy(update={"source": RowList(listed, shots.source.label())})
            changes["shots"] = shots
    bare = rows
    if passages is not None:
        rows = with_passages(task.model_copy(update=changes), task, rows, subject, passages)
    return task.model_copy(update={**changes, "source": RowList(rows, task.source.label(), bare if passages is not None else ())})


def _rephrased(task: Task, variant: Variant, rows: Rows) -> Rows:
    return [(where, rephrased(row, question_column(row, _named(task), where), variant, where)) for where, row in rows]


def _named(task: Task) -> list[str]:
    """Columns that the task's settings say are the question."""
    settings = getattr(task, "format", None)
    own = (getattr(task, name, None) for name in ("question", "text", "query"))
    names = [*own, *(getattr(settings, name, None) for name in ("messages", "prompt", "instruction"))]
    return [name for name in names if isinstance(name, str)]


def with_passages(
    plain: Task, task: Task, rows: Rows, subject: Subject, passages: Passages, *, without_own: bool = False, limit: int | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """`rows` with the passages that share most with each question in front of it, never more than the model's context holds.

    Args:
        plain: the task that renders prompts.
        without_own: leave out passages that hold the question itself; for rows to train on.
        limit: tokens of prompt and answer, where it is less than the context.
    """
    from ftcli.models.generate import context_length, prompt_ids

    settings, tokenizer = task.retrieve, subject.tokenizer
    assert settings is not None
    context = min((size for size in (context_length(subject.model.module), limit) if size is not None), default=None)
    num_shots, beside = _beside(plain, subject)
    answer = getattr(task, "max_new_tokens", ANSWER_TOKENS)
    room = None if context is None else (context - answer - beside) // (num_shots + 1)
    found = []
    for where, row in rows:
        name = question_column(row, _named(task), where)
        question = question_of_row(row, name, where)

        def fits(text: str, row: Any = row, name: str = name, where: str = where) -> bool:
            prompt = plain.prompts([(where, asked(row, name, text, None, where))], tokenizer)[0]
            return room is None or len(prompt_ids(tokenizer, prompt)) <= room

        best = passages.search(question, settings.count, without=question if without_own else "")
        found.append((where, asked(row, name, settings.question(question, best, tokenizer, fits), None, where)))
    return found


def _beside(task: Task, subject: Subject) -> tuple[int, int]:
    """(solved examples that carry passages, too; tokens of those that do not)."""
    from ftcli.data.leakage import read_text
    from ftcli.evaluation.tasks.retrieve import num_tokens

    shots = getattr(task, "shots", None)
    if shots is None:
        return 0, 0
    if shots.source is None:
        return shots.count, 0
    rows = list(shots.source.rows())
    solved = zip(task.prompts(rows, subject.tokenizer), (read_text(row, where).answer for where, row in rows), strict=True)
    sizes = sorted(num_tokens(prompt + answer + shots.separator, subject.tokenizer) for prompt, answer in solved)
    return 0, sum(sizes[-shots.count :]) + MARKUP_TOKENS * shots.count


def _measure_best(task: Task, subject: Subject, passages: Passages | None) -> TaskResult:
    """The best way to ask on validation rows, measured on the others."""
    assert task.variants is not None
    division = _divided(task, task.variants, subject)
    validation, rest = division.validation, division.measured
    tried: list[tuple[Variant, Figure, str]] = []
    for variant in task.variants.prompts:
        result = posed(task, variant, validation, subject, passages).measure(subject)
        name = main_figure(task, result)
        tried.append((variant, result.figures[name], name))
    best, figure, name = max(tried, key=lambda one: one[1].interval.value * (1 if one[1].higher_is_better else -1))
    result = posed(task, best, rest, subject, passages).measure(subject)
    result.details["variants"] = {
        "chosen": best.name,
        "figure": name,
        "validation_rows": len(validation),
        "rows": len(rest),
        "table": [{"name": one.name, **value.to_json(), "p_value": _chance(figure, value)} for one, value, _ in tried],
    }
    where = "validation rows" if task.variants.validation is not None else "rows of its own"
    result.notes.append(
        f"prompt `{best.name}` was chosen among {len(tried)} on {len(validation)} {where} ({name} {figure.interval.value:.4g} there); "
        f"the figures are of {len(rest)} other rows"
    )
    if (left := division.left_out) is not None:
        result.notes.append(left)
    return result


def _divided(task: Task, variants: Variants, subject: Subject) -> Division:
    """The rows of a task as its ways to ask divide them, by what is asked and not by where it stands."""
    rows = list(task.read_rows())
    others = None if variants.validation is None else list(variants.validation.rows())
    keys = [question_key(prompt) for prompt in task.prompts(rows, subject.tokenizer)]
    other_keys = [] if others is None else [question_key(prompt) for prompt in task.prompts(others, subject.tokenizer)]
    return variants.divide(rows, keys, others, other_keys)


def _chance(best: Figure, other: Figure) -> float | None:
    """Two-sided p that the best one is better by chance; not corrected for the choice."""
    found = None if best is other else best.against(other)
    return None if found is None else found.p_value


def _groups(task: Task, name: str, result: TaskResult) -> dict[str, Any]:
    """The main figure for each value of a column.

    Raises:
        DataError: a row has no such column, or it tells too many values apart.
    """
    import numpy as np

    values: dict[str, str] = {}
    for where, row in task.read_rows():
        value = column(row, name, where)
        if not isinstance(value, str | int | float | bool):
            raise DataError(
                f"task `{task.name}`", [Problem(where, f"column `{name}` is {type(value).__name__}, and no name of a group", None)]
            )
        values[where] = str(value)
    if len(set(values.values())) > MAX_GROUPS:
        what = f"column `{name}` has {len(set(values.values()))} different values"
        raise DataError(f"task `{task.name}`", [Problem("group_by", what, f"a column with at most {MAX_GROUPS}, such as a topic or a tag")])
    figure, of_rows = main_figure(task, result), np.array([values.get(str(row["where"]), "") for row in result.rows])
    parts = {value: result.figures[figure].of_rows(of_rows == value) for value in sorted(set(of_rows.tolist()))}
    return {
        "column": name,
        "figure": figure,
        "rows": of_rows.tolist(),
        "table": [{"group": value, "rows": int((of_rows == value).sum()), **part.to_json()} for value, part in parts.items() if part],
    }


def _clean(task: Task, train: Sequence[HasRows], result: TaskResult) -> dict[str, Any]:
    """Figures of the rows that do not stand in training data, and which do."""
    import numpy as np

    from ftcli.data.leakage import find_leakage, read_text

    assert task.leakage is not None
    if not train:
        return {"checked": False, "leaked": [], "rows": len(result.rows), "figures": {}}
    learnt = [read_text(row, where) for source in train for where, row in source.rows()]
    held_out = [read_text(row, where) for where, row in task.read_rows()]
    leaked = {hit.where: hit for hit in find_leakage(learnt, held_out, min_near=task.leakage.min_near).leaked}
    is_clean = np.array([str(row["where"]) not in leaked for row in result.rows], dtype=bool)
    parts = {name: figure.of_rows(is_clean) for name, figure in result.figures.items()}
    measured = {str(row["where"]) for row in result.rows}
    return {
        "checked": True,
        "training_rows": len(learnt),
        "rows": int(is_clean.sum()),
        "leaked": [{"where": hit.where, "kind": hit.kind, "other": hit.other} for hit in leaked.values() if hit.where in measured],
        "figures": {name: part.to_json() for name, part in parts.items() if part is not None},
    }
