"""What is seen of the fields of classifiers: observables for the table of `test_fields`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftcli.cli.main import run
from ftcli.data.prepare import prepare
from ftcli.data.settings import Data, EvaluationSource, TrainSource
from ftcli.data.sources.builtin import Builtin
from ftcli.data.sources.file import File
from ftcli.errors import FtcliError
from ftcli.layout.build import build_posed
from ftcli.methods.features import Features
from ftcli.objectives.classification import Classification, OutOfScope
from ftcli.training.assemble import cache_folder

ROWS = [("a good day", "up"), ("a bad day", "down"), ("a fine good day", "up"), ("another good day", "up")]
HELD_OUT = [("good days", "up"), ("a bad cold day", "down"), ("zebra", "oos"), ("quark", "none"), ("a fine day", "up"), ("lamp", "oos")]


def posed(world: Any, objective: Any) -> Any:
    """How a prompt with its completion is put to a model, or a text with its label."""
    source: Any = Builtin(name="orders") if "chat" in objective.formats else file_of(world, "train", ROWS)
    data = Data(train=(TrainSource(source=source, limit=4),), holdout=0.0)
    stores = prepare(data, world.tokenizer, cache_folder=cache_folder(), formats=objective.formats).train
    try:
        settled = objective.settled(stores, [], world.tokenizer)
    except FtcliError as error:
        return str(error)
    items = [settled.pose(stores[0].tree(index)) for index in range(len(stores[0]))]
    return settled.head, [(item.tree.tokens.tolist(), item.target_weights.tolist(), item.weight, _plain(item.labels)) for item in items]


def _plain(labels: Any) -> Any:
    return None if labels is None else labels.tolist()


def scored(world: Any, objective: Classification) -> Any:
    """What every target's log-probability of -1 makes of the labels."""
    stores = prepare(
        Data(train=(TrainSource(source=file_of(world, "train", ROWS)),), holdout=0.0),
        world.tokenizer,
        cache_folder=cache_folder(),
        formats=objective.formats,
    ).train
    settled = objective.settled(stores, [], world.tokenizer)
    batch = build_posed("forest", [settled.pose(stores[0].tree(0))])
    return settled.scores(torch.full((len(batch.targets),), -1.0), batch).tolist()


def held_out(world: Any, objective: Classification) -> Any:
    """What is said of held-out rows with labels that are not trained."""
    data = Data(
        train=(TrainSource(source=file_of(world, "train", ROWS)),), evaluation=(EvaluationSource(source=file_of(world, "test", HELD_OUT)),)
    )
    found = prepare(data, world.tokenizer, cache_folder=cache_folder(), formats=objective.formats)
    try:
        settled = objective.settled(found.train, found.evaluation, world.tokenizer)
    except FtcliError as error:
        return str(error)
    return [_plain(settled.pose(found.evaluation[0].tree(index)).labels) for index in range(len(HELD_OUT))]


def called_outside(world: Any, settings: OutOfScope) -> Any:
    """Measures of made-up probabilities, the labels of held-out rows with them."""
    objective = Classification(labels=("down", "up"), out_of_scope=settings, unseen_labels="count-as-wrong")
    truth = np.array([float(labels[0]) for labels in held_out(world, objective)])[:, None]
    scores = np.array([[0.2, 0.8], [0.9, 0.1], [0.55, 0.45], [0.4, 0.6], [0.35, 0.65], [0.3, 0.7]])
    return objective.measures(scores, truth)


def fitted(world: Any, method: Features) -> Any:
    """The classifier that two steps over six reviews leave."""
    name = f"features-{abs(hash(method))}"
    document = {
        "version": 1,
        "name": name,
        "model": {"base": "builtin:tiny"},
        "data": {"train": [{"source": {"kind": "builtin", "name": "reviews"}, "limit": 6}], "holdout": 0.0},
        "method": method.model_dump(),
        "objective": {"kind": "classification"},
        "train": {"steps": 2, "global_batch_size": 6},
        "output": str(world.folder / name),
    }
    path: Path = world.folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    if not (world.folder / name).exists():
        assert run(["train", str(path)]) == 0
    return (world.folder / name / "adapter" / "feature_head.safetensors").read_bytes()


def fitted_mlp(world: Any, method: Features) -> Any:
    """The same with a hidden layer."""
    return fitted(world, method)


def file_of(world: Any, name: str, rows: list[tuple[str, str]]) -> File:
    path: Path = world.folder / f"labelled-{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return File(path=str(path))
