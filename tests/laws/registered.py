"""Everything that is registered, and a few steps of a real run without its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from torch import nn

from ftcli.errors import FtcliError
from ftcli.layout.model import TreeModel
from ftcli.layout.probe import LayoutChoice
from ftcli.methods import Method
from ftcli.methods.context import AttachContext
from ftcli.recipe.load import load_recipe
from ftcli.recipe.recipe import Recipe
from ftcli.training.assemble import (
    DataParts,
    ModelParts,
    assemble_data,
    assemble_learner,
    frequent_answers,
    load_base,
    make_accelerator,
    sample_batches,
)
from ftcli.training.step import optimizer_step

# Far larger first weights than usual: with a frozen random head of the usual size nothing could be learnt beside it.
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    # For what trains biases alone.
    "attention_bias": True,
    "mlp_bias": True,
}
# The first word tells them apart, so that every other word can be known for sure.
SENTENCES = (
    "Ada mends the old clock by the window",
    "Ben sells seven green apples at noon",
    "Cora feeds a grey cat behind the mill",
    "Dan writes long letters to his sister",
    "Eve paints the boat blue before supper",
    "Finn counts the stars above the harbour",
    "Gus bakes brown bread for the market",
    "Hal carries water up the steep hill",
)


def union_members(union: Any) -> tuple[Any, ...]:
    """The classes of a (discriminated) union, in the order of their registration; a class alone is its own."""
    while get_origin(union) is Annotated:
        union = get_args(union)[0]
    return get_args(union) or (union,)


# Choices that are as many as there are tests elsewhere: tests/unit/test_peft_kind.py goes through PEFT's types.
TRIED_ELSEWHERE = {("Peft", "type")}


def language_methods() -> tuple[Any, ...]:
    """The methods that can be tried on a language model; those that read features of a classifier have their laws in
    test_classification."""
    return tuple(member for member in union_members(Method) if not member.reads_features)


def choices(spec: type[BaseModel]) -> Iterator[Any]:
    """`spec` as it is by default, and with every other choice that one of its fields offers, one at a time."""
    yield spec()
    for name, field in spec.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from (spec(**{name: other}) for other in list(choices(type(default)))[1:])
        elif get_origin(field.annotation) is Literal and name != "kind" and (spec.__name__, name) not in TRIED_ELSEWHERE:
            for value in get_args(field.annotation):
                if value != default and (other := _valid(spec, {name: value})) is not None:
                    yield other


def _valid(spec: type[BaseModel], values: dict[str, Any]) -> Any:
    """The settings, None if they contradict each other."""
    try:
        return spec(**values)
    except ValueError:
        return None


def described(settings: BaseModel) -> str:
    """The kind and what differs from the defaults."""
    changed = settings.model_dump(exclude_defaults=True)
    return " ".join([str(getattr(settings, "kind", type(settings).__name__)), *(str(value) for value in _leaves(changed))])


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


@dataclass(frozen=True)
class Steps:
    """What a few steps did."""

    module: nn.Module
    before: dict[str, Any]
    """Every parameter and buffer, as it was when the method had been attached."""
    losses: list[float]
    """Nats per target before each step."""


@dataclass(frozen=True)
class Bench:
    """A recipe with its data prepared, on which any method, optimizer and schedule can be tried."""

    recipe: Recipe
    data: DataParts

    def with_train(self, **changes: Any) -> Bench:
        """The same data with other settings of `train`."""
        return replace(self, recipe=self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update=changes)}))

    def parts(self, method: Any) -> tuple[Recipe, ModelParts]:
        """A fresh base with `method` attached."""
        recipe = self.recipe.model_copy(update={"method": method})
        accelerator = make_accelerator(recipe, None)
        base = load_base(recipe, self.data.tokenizer, accelerator.device)
        context = AttachContext(
            seed=5,
            sample_batches=lambda count: sample_batches(recipe, self.data, count),
            original_base=lambda: load_base(recipe, self.data.tokenizer, accelerator.device, quantized=False),
            tokenizer=self.data.tokenizer,
            answers=lambda count: frequent_answers(self.data, count),
        )
        module = method.attach(base, context)
        model = TreeModel(module, "forest")
        return recipe, ModelParts(module, model, LayoutChoice("forest", "a Llama"), recipe.train.lr or method.lr_at(64))

    def run(self, method: Any, num_steps: int, stop: Callable[[float], bool] = lambda loss: False) -> Steps:
        """Train a fresh base with `method` for so many steps, or until `stop` says so of the loss."""
        recipe, parts = self.parts(method)
        tensors = [*parts.module.named_parameters(), *parts.module.named_buffers()]
        before = {name: tensor.detach().clone() for name, tensor in tensors}
        learner, batches = assemble_learner(recipe, self.data, parts, make_accelerator(recipe, None))
        learner.model.train()
        losses: list[float] = []
        for step in range(1, num_steps + 1):
            losses.append(optimizer_step(learner, batches.at(step), recipe.train.schedule.factor_at(step, num_steps)).loss)
            if stop(losses[-1]):
                break
        return Steps(parts.module, before, losses)


def make_bench(folder: Path, **train: Any) -> Bench:
    """Eight sentences, all of them in every step, and a random Llama of two layers."""
    (folder / "sentences.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    document = {
        "version": 1,
        "name": "bench",
        "model": {"init": {"architecture": "llama", "config": LLAMA}, "tokenizer": "builtin:tiny"},
        "data": {"train": [{"source": {"kind": "file", "path": "sentences.jsonl"}}], "holdout": 0.0},
        "train": {"steps": 200, "global_batch_size": len(SENTENCES), "schedule": {"kind": "constant"}, **train},
    }
    path = folder / "bench.yaml"
    path.write_text(json.dumps(document))
    recipe = load_recipe(path).recipe
    return Bench(recipe, assemble_data(recipe, None))


def refusal(act: Callable[[], Any]) -> str | None:
    """What ftcli says when it refuses to act, None if it does it."""
    try:
        act()
    except FtcliError as error:
        return str(error)
    return None
