"""What a comparison of approaches may say, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ftcli.data.settings import TrainSource
from ftcli.data.sources import Source
from ftcli.evaluation.tasks import Task
from ftcli.evaluation.tasks.retrieve import Retrieve
from ftcli.evaluation.tasks.shots import Choose
from ftcli.evaluation.tasks.variants import Variants
from ftcli.methods import Method
from ftcli.methods.lora import Lora
from ftcli.recipe.explain import Finding
from ftcli.recipe.load import load_document
from ftcli.recipe.train import Train
from ftcli.spec import FolderName, LocalPath, ModelReference, Spec

TITLE = "ftcli comparison of approaches"


class Prompting(Spec):
    """The base as it is; of several ways to ask, the one that is best on training rows."""

    kind: Literal["prompting"] = "prompting"
    name: FolderName = "prompting"
    """What the table calls it."""
    variants: Variants | None = None
    """Ways to ask; without `validation`, the best is chosen on the first `limit` (100) training rows."""


class FewShot(Spec):
    """The base with solved training rows in front of every question."""

    kind: Literal["few-shot"] = "few-shot"
    name: FolderName = "few-shot"
    """What the table calls it."""
    count: int = Field(default=3, ge=1)
    """How many; a larger value makes every request longer."""
    choose: Choose = "nearest"
    """Which: see `shots.choose` of a task."""
    separator: str = "\n\n"
    """What stands between them."""
    seed: int = Field(default=17, ge=0)
    """Of shuffles and draws."""


class Retrieval(Spec):
    """The base with passages of documents in front of every question."""

    kind: Literal["retrieval"] = "retrieval"
    name: FolderName = "retrieval"
    """What the table calls it."""
    retrieve: Retrieve
    """The documents, and how many passages."""


class FineTuning(Spec):
    """A model trained on the training rows; with `retrieve`, with passages in front of every question, too."""

    kind: Literal["fine-tuning"] = "fine-tuning"
    name: FolderName = "fine-tuning"
    """What the table and the run are called."""
    method: Method = Lora()
    """Which weights move."""
    train: Train = Train()
    """How far, how fast, on what hardware."""
    retrieve: Retrieve | None = None
    """Documents to look up, as with `retrieval`."""
    passages_in_training: bool = True
    """With `retrieve`: train on rows with passages, too, as the model will be asked; never with one that holds the row's own question."""


Approach = Annotated[Prompting | FewShot | Retrieval | FineTuning, Field(discriminator="kind")]


class Changed(Spec):
    """The same task after the facts have changed: every approach is measured on it, and nothing is trained again."""

    source: Source
    """Rows with the answers that hold from then on."""
    documents: Source | None = None
    """The documents as they are from then on; the default is those of before."""


class Comparison(Spec):
    """One task, and ways to solve it side by side."""

    version: Literal[1]
    """Version of the language."""
    name: FolderName
    """Names the comparison and its folder."""
    base: ModelReference
    """The model that all approaches begin from: builtin:NAME, a local folder, or a hub id."""
    task: Task
    """What is to be solved: rows that no approach has seen, and how answers are judged."""
    train: tuple[TrainSource, ...] = Field(min_length=1)
    """Rows to train on; solved examples and the choice of a prompt come from them, too."""
    max_length: int = Field(default=1024, ge=2)
    """Longest training example in tokens."""
    approaches: tuple[Approach, ...] = Field(min_length=2)
    """What is compared; the first is what the others are compared with."""
    retained: tuple[Task, ...] = ()
    """What the base could do before and must not lose: measured on the base and on every trained model."""
    changed: Changed | None = None
    """The task after the facts have changed."""
    timed_requests: int = Field(default=8, ge=1)
    """Requests that are timed one by one for the latency."""
    output: LocalPath | None = None
    """The folder; the default is comparisons/<name> in the current folder."""

    @property
    def folder(self) -> Path:
        return Path(self.output) if self.output is not None else Path.cwd() / "comparisons" / self.name


def load_comparison(path: Path) -> tuple[Comparison, str]:
    """The comparison at `path` and its text; relative paths in it count from its folder.

    Raises:
        RecipeError: it cannot be read, or something in it is wrong; names every problem with its line.
    """
    comparison, text, _ = load_document(path, Comparison, TITLE, _relations)
    return comparison, text


def _relations(data: dict[str, Any]) -> list[Finding]:
    findings: list[Finding] = []
    approaches, task, retained = data.get("approaches"), data.get("task"), data.get("retained")
    seen: dict[str, int] = {}
    listed = [one for one in approaches if isinstance(one, dict)] if isinstance(approaches, list) else []
    for index, one in enumerate(listed):
        name = one.get("name", one.get("kind"))
        if isinstance(name, str) and seen.setdefault(name, index) != index:
            hint = "give each its own name"
            findings.append((("approaches", index), f"`{name}` is the name of approaches.{seen[name]}, too", hint))
    if isinstance(task, dict):
        if task.get("kind") in ("language-modelling", "preference"):
            findings.append((("task", "kind"), f"`{task['kind']}` asks no question that could be prompted otherwise", "kind: generation"))
        for key, approach in (("shots", "few-shot"), ("variants", "prompting"), ("retrieve", "retrieval")):
            if task.get(key) is not None:
                hint = f"it is an approach: `{{kind: {approach}, ...}}` under `approaches`"
                findings.append((("task", key), f"`{key}` would be part of every approach", hint))
    for index, one in enumerate(retained if isinstance(retained, list) else ()):
        if isinstance(one, dict) and isinstance(task, dict) and one.get("name") == task.get("name"):
            findings.append((("retained", index, "name"), f"`{one['name']}` is the name of the task", "give each its own name"))
    return findings
