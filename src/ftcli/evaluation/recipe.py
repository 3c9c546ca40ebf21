"""What an evaluation recipe may say, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ftcli.evaluation.tasks import Task
from ftcli.recipe.explain import Finding
from ftcli.recipe.load import load_document
from ftcli.recipe.yaml import KeyPath
from ftcli.spec import Spec

TITLE = "ftcli evaluation recipe"
_ASKS_NONE = "changes a question, and kind `language-modelling` asks none"
_ROWS_OF_HARNESS = "reads the rows, and those of kind `lm-eval` are the harness's"
_NOT_FOR = {
    "language-modelling": dict.fromkeys(("variants", "retrieve"), _ASKS_NONE),
    "lm-eval": dict.fromkeys(("variants", "retrieve", "group_by", "leakage"), _ROWS_OF_HARNESS),
}
"""By kind of task the keys that it cannot have, and why."""


class EvaluationRecipe(Spec):
    """Tasks, and what a model must reach on them."""

    version: Literal[1]
    """Version of the language."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    """What is measured."""
    gates: tuple[str, ...] = ()
    """Bounds such as `orders.exact_match >= 0.9`; `--gate` adds more."""


def load_evaluation_recipe(path: Path) -> EvaluationRecipe:
    """The recipe at `path`; relative paths in it count from its folder.

    Raises:
        RecipeError: it cannot be read, or something in it is wrong; names every problem with its line.
    """
    recipe, _, _ = load_document(path, EvaluationRecipe, TITLE, _relations)
    return recipe


def _relations(data: dict[str, Any]) -> list[Finding]:
    from ftcli.errors import FtcliError
    from ftcli.evaluation.gates import parse_gate

    findings: list[Finding] = []
    tasks, gates = data.get("tasks"), data.get("gates")
    seen: dict[str, int] = {}
    for index, task in enumerate(tasks if isinstance(tasks, list) else ()):
        name = task.get("name") if isinstance(task, dict) else None
        if isinstance(name, str) and seen.setdefault(name, index) != index:
            findings.append((("tasks", index, "name"), f"`{name}` is the name of tasks.{seen[name]}, too", "give each its own name"))
        for key, what in _NOT_FOR.get(str(task.get("kind")), {}).items() if isinstance(task, dict) else ():
            if task.get(key) is not None:
                findings.append((("tasks", index, key), f"`{key}` {what}", "leave it out"))
    for index, gate in enumerate(gates if isinstance(gates, list) else ()):
        path: KeyPath = ("gates", index)
        try:
            parsed = parse_gate(gate) if isinstance(gate, str) else None
        except FtcliError as error:
            findings.append((path, "a gate cannot be read", error.problems[0].hint))
            continue
        if parsed is not None and seen and parsed.task not in seen:
            findings.append((path, f"there is no task `{parsed.task}`", f"tasks: {', '.join(seen)}"))
    return findings
