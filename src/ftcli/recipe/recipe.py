"""The recipe: four independent axes and where the result goes."""

from __future__ import annotations

from typing import Literal

from ftcli.data.settings import Data
from ftcli.methods import Method
from ftcli.methods.lora import Lora
from ftcli.models.settings import Model
from ftcli.objectives import Objective
from ftcli.objectives.causal_lm import CausalLM
from ftcli.recipe.init_from import InitFrom
from ftcli.recipe.train import Every, Train
from ftcli.spec import FolderName, LocalPath, Spec

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class Recipe(Spec):
    """One fine-tuning run: base model, data, method, objective, schedule."""

    version: Literal[1]
    """Version of the recipe language."""
    name: FolderName
    """Names the run and its folder: letters, digits, dots, dashes, underscores."""
    model: Model
    """The base model."""
    data: Data
    """What is seen, in which order and proportion."""
    method: Method = Lora()
    """Which weights move, and how they fold back."""
    objective: Objective = CausalLM()
    """What is minimised."""
    train: Train = Train()
    """How far, how fast, on what hardware."""
    every: Every = Every()
    """When to log, evaluate and save."""
    init_from: InitFrom | None = None
    """Another run to begin from: its adapter or its model, and nothing else of it."""
    trackers: tuple[Tracker, ...] = ()
    """Where metrics go beside metrics.jsonl; each is an extra."""
    output: LocalPath | None = None
    """The run folder; the default is runs/<name> in the current folder."""
