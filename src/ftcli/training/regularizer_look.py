"""What can be said of a recipe's regularizers before there is a model: is what they name there, and can it fit?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.look import look
from ftcli.data.settings import Data, TrainSource
from ftcli.errors import Problem, RequestError
from ftcli.models.locate import model_folder
from ftcli.objectives.regularize.ewc import EWC
from ftcli.objectives.regularize.kl import KL
from ftcli.training.fisher_file import require_fisher_file
from ftcli.training.resources import teacher_refused

if TYPE_CHECKING:
    from ftcli.data.look import SourceLook
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.recipe import Recipe


def look_at_regularizers(recipe: Recipe, tokenizer: Tokenizer) -> list[SourceLook]:
    """What the first rows become that are measured on and not trained on.

    Raises:
        RequestError: all rows, earlier runs and teachers that are not there or cannot fit.
    """
    looks: list[SourceLook] = []
    problems: list[Problem] = []
    for settings in recipe.objective.regularize:
        if settings.weight == 0:
            continue
        if isinstance(settings, EWC):
            with collecting(problems):
                if (rows := fisher_data(settings, recipe.data)) is not None:
                    looks += look(rows, tokenizer, formats=recipe.objective.formats)
            with collecting(problems):
                if settings.earlier is not None:
                    require_fisher_file(settings.earlier)
        elif isinstance(settings, KL) and settings.teacher not in ("base", "start"):
            with collecting(problems):
                _require_teacher(settings.teacher, recipe)
    raise_any(problems)
    return looks


@contextmanager
def collecting(problems: list[Problem]) -> Iterator[None]:
    """What is refused inside is told later, with all else that is."""
    try:
        yield
    except RequestError as error:
        problems += error.problems or [Problem("objective.regularize", error.summary, error.hint)]


def raise_any(problems: list[Problem]) -> None:
    """
    Raises:
        RequestError: there are problems.
    """
    if problems:
        raise RequestError("`objective.regularize` cannot hold the run", problems)


def fisher_data(settings: EWC, own: Data) -> Data | None:
    """The rows that F is measured on, cut as those that train; None where it is measured on these."""
    if settings.rows is None:
        return None
    source = TrainSource(source=settings.rows.source, format=settings.rows.format)
    return Data(train=(source,), holdout=0.0, max_length=own.max_length, on_overflow=own.on_overflow, workers=own.workers)


def require_same_vocabulary(teacher: str | None, theirs: int, ours: int) -> None:
    """
    Raises:
        RequestError: the teacher predicts other tokens than the model.
    """
    if ours != theirs:
        what = f"`{teacher}` predicts {theirs} tokens and the model {ours}"
        problem = Problem("objective.regularize.teacher", what, "a model of the same vocabulary")
        raise RequestError("the teacher does not fit the model", [problem])


def named_vocabulary(teacher: str) -> int | None:
    """How many tokens a teacher predicts, as its configuration says; None where that says nothing which can be read here.

    Raises:
        RequestError: there is no such model.
    """
    try:
        return _vocabulary(model_folder(teacher, weights=False))
    except RequestError as error:
        raise teacher_refused(error) from error


def _require_teacher(teacher: str, recipe: Recipe) -> None:
    """
    Raises:
        RequestError: it is not there, or its configuration names another vocabulary than that of the base.
    """
    theirs, model = named_vocabulary(teacher), recipe.model
    # Only with the model it is known how many rows new tokens make.
    if theirs is None or model.base is None or model.add_tokens is not None:
        return
    ours = _vocabulary(model_folder(model.base, model.revision, weights=False))
    if ours is not None:
        require_same_vocabulary(teacher, theirs, ours)


def _vocabulary(folder: Path) -> int | None:
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return found if isinstance(found, int) else None
