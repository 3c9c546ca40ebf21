"""The labels that a trained classifier gives to the rows of a file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import DataError, Problem, RequestError
from ftcli.exporting.open_target import open_target
from ftcli.reporting.found_run import METRICS, RESOLVED_RECIPE, is_run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from ftcli.data.formats.label import Label
    from ftcli.data.tree import TokenTree
    from ftcli.models.generate import Progress
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.objectives.classification import Classification
    from ftcli.recipe.recipe import Recipe

MICRO_BATCH_TOKENS = 4096
MAX_PROBLEMS = 10
NUM_DETECTED = 64


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a classifier says of one row."""

    where: str
    label: str | None
    """None where a text may have several labels, or a number."""
    probability: float | None
    """Of the likeliest label, in 0..1, also where it is not sure enough."""
    out_of_scope: bool
    labels: tuple[str, ...] | None
    """All labels of a text that may have several."""
    value: float | None
    """The number of a regression."""

    def to_json(self) -> dict[str, Any]:
        """Without what the task does not have."""
        values = {"label": self.label, "probability": self.probability, "labels": self.labels, "value": self.value}
        said = {name: value for name, value in values.items() if value is not None}
        return {"where": self.where, **said, **({"out_of_scope": self.out_of_scope} if self.label is not None else {})}


def predict_file(target: str, data: Path, *, device: str = "auto", progress: Progress | None = None) -> list[Prediction]:
    """A prediction for each row of `data`, in its order.

    Args:
        target: a classifier's run, what it left or one of its checkpoints, or a model folder with a classification head.
        data: a file as a recipe's `source: {kind: file}` reads it; rows need the text and no label.

    Raises:
        RequestError: the target is no classifier, or a row cannot be used.
    """
    loaded = open_target(target, device=device)
    recipe, run = _recipe_of(Path(target).expanduser())
    objective = _objective(loaded.model, recipe, target).readied(loaded.tokenizer)
    rows = list(_rows(data))
    wheres, trees = _trees(rows, _format(recipe, rows, str(data)), loaded.tokenizer, recipe)
    scores = _scores(loaded.model, objective, trees, _layout(run), loaded.tokenizer.pad_id or 0, progress)
    return _named(objective, scores, wheres, _threshold(objective, run))


def _recipe_of(path: Path) -> tuple[Recipe | None, Path | None]:
    """The recipe and the folder of the run that `path` is, or is a part of."""
    from ftcli.recipe.load import load_recipe

    run = next(
        (folder for folder in (path, path.parent, path.parent.parent) if is_run(folder) and (folder / RESOLVED_RECIPE).is_file()), None
    )
    return (None, None) if run is None else (load_recipe(run / RESOLVED_RECIPE).recipe, run)


def _objective(model: nn.Module, recipe: Recipe | None, target: str) -> Classification:
    """The run's objective; of a model folder what its configuration says.

    Raises:
        RequestError: it is no classifier.
    """
    from ftcli.layout.model import inner_model
    from ftcli.models.classifier import is_classifier
    from ftcli.objectives.classification import Classification

    if recipe is not None and isinstance(recipe.objective, Classification):
        return recipe.objective
    inner: Any = inner_model(model)
    if not is_classifier(inner):
        problem = Problem(
            target, "is no classifier", "train one with `objective: {kind: classification}`; `ftcli generate` answers with text"
        )
        raise RequestError("labels cannot be predicted", [problem])
    config = inner.config
    kinds = {"multi_label_classification": "multi", "regression": "regression"}
    task: Any = kinds.get(str(config.problem_type), "regression" if config.num_labels == 1 else "single")
    labels = None if task == "regression" else tuple(str(config.id2label[index]) for index in range(config.num_labels))
    return Classification(task=task, labels=labels)


def _rows(data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from ftcli.data.sources.file import File

    return File(path=str(data.expanduser().absolute())).rows()


def _format(recipe: Recipe | None, rows: Sequence[tuple[str, dict[str, Any]]], name: str) -> Label:
    """The format that the run was trained with, or the one that fits the columns; labels need not be there."""
    from ftcli.data.formats.label import Label

    given = recipe.data.train[0].format if recipe is not None else None
    if isinstance(given, Label):
        return given
    first = [row for _, row in itertools.islice(rows, NUM_DETECTED)]
    found = Label.detect({"label", *(column for row in first for column in row)}, first)
    if found is None:
        columns = ", ".join(dict.fromkeys(column for row in first for column in row)) or "none"
        raise DataError("the rows cannot be read", [Problem(name, f"has no column with a text (columns: {columns})", "name it `text`")])
    return found


def _trees(
    rows: Sequence[tuple[str, dict[str, Any]]], settings: Label, tokenizer: Tokenizer, recipe: Recipe | None
) -> tuple[list[str], list[TokenTree]]:
    """Where each row stands, and its tokens.

    Raises:
        DataError: rows are wrong, or longer than what was trained.
    """
    from ftcli.data.chunks import problems_of
    from ftcli.data.overflow import fit
    from ftcli.data.tokenise import Tokeniser

    tokeniser = Tokeniser(tokenizer)
    problems: list[Problem] = []
    wheres: list[str] = []
    trees: list[TokenTree] = []
    cuts = recipe is not None and recipe.data.on_overflow == "truncate_prompt"
    for index, (where, row) in enumerate(rows):
        try:
            example = tokeniser.encode(settings.question(row, tokenizer, where), where, index)
        except RequestError as error:
            problems += problems_of(error)
            continue
        limit = recipe.data.max_length if recipe is not None else example.longest_branch
        found = fit(example, limit, "truncate_prompt" if cuts else "error")
        if not found:
            problems.append(
                Problem(where, f"{example.longest_branch} tokens, and the classifier was trained on {limit} at most", "shorten it")
            )
        wheres += [where] * len(found)
        trees += found
    if problems:
        more = f"; the first {MAX_PROBLEMS} of {len(problems)}" if len(problems) > MAX_PROBLEMS else ""
        raise DataError(f"rows cannot be used{more}", problems[:MAX_PROBLEMS])
    return wheres, trees


def _layout(run: Path | None) -> str:
    """The layout that the run found its model to be right in; rows where nothing is known."""
    if run is None or not (run / "manifest.json").is_file():
        return "rows"
    return str(json.loads((run / "manifest.json").read_text(encoding="utf-8")).get("layout", {}).get("layout", "rows"))


def _scores(
    model: nn.Module, objective: Classification, trees: Sequence[TokenTree], layout: str, pad_id: int, progress: Progress | None
) -> NDArray[np.float64]:
    """(N, C) probabilities, or (N, 1) numbers."""
    import numpy as np
    import torch

    from ftcli.layout.build import build_posed
    from ftcli.layout.model import TreeModel
    from ftcli.layout.plan import plan_micro_batches

    scores = np.zeros((len(trees), len(objective.class_labels)))
    tree_model, device, done = TreeModel(model, layout).eval(), next(model.parameters()).device, 0
    lengths = [len(tree) + objective.num_added_tokens for tree in trees]
    with torch.inference_mode():
        for part in plan_micro_batches(lengths, 1, MICRO_BATCH_TOKENS)[0] if trees else []:
            batch = build_posed(layout, [objective.pose(trees[index], is_measured=True) for index in part], pad_id).to(device)
            scores[part] = objective.scores(tree_model(batch).double(), batch).cpu().numpy()
            done += len(part)
            if progress is not None:
                progress.update(done, len(trees), "predicting labels")
    return scores


def _threshold(objective: Classification, run: Path | None) -> float | None:
    """The probability below which no label is sure enough; of `auto` what the run's last evaluation chose."""
    if objective.out_of_scope is None:
        return None
    if objective.out_of_scope.threshold != "auto":
        return objective.out_of_scope.threshold
    records = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()] if run is not None else []
    sources = [values for record in records if record["kind"] == "evaluate" for values in record["sources"].values()]
    found: list[float] = [values["threshold"] for values in sources if values["role"] == "target" and "threshold" in values]
    if not found:
        hint = "train with evaluation data, or with `objective.out_of_scope.threshold: 0.7`"
        raise RequestError("no threshold was chosen: the run has measured nothing on held-out data", hint=hint)
    return found[-1]


def _named(objective: Classification, scores: NDArray[np.float64], wheres: Sequence[str], threshold: float | None) -> list[Prediction]:
    labels = objective.class_labels
    predictions: list[Prediction] = []
    for where, row in zip(wheres, scores.tolist(), strict=True):
        if objective.task == "regression":
            predictions.append(Prediction(where, None, None, False, None, row[0]))
        elif objective.task == "multi":
            chosen = tuple(label for label, probability in zip(labels, row, strict=True) if probability >= 0.5)
            predictions.append(Prediction(where, None, None, False, chosen, None))
        else:
            probability = max(row)
            is_outside = threshold is not None and probability < threshold
            outside = objective.out_of_scope.label if objective.out_of_scope is not None and is_outside else None
            predictions.append(Prediction(where, outside or labels[row.index(probability)], probability, is_outside, None, None))
    return predictions
