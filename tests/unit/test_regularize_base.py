"""The teacher `base` is the base whatever trains in place beside an adapter, and kept answers are found by all that decides them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws.registered import Bench, make_bench

from ftcli.data.sources.builtin import Builtin
from ftcli.errors import RequestError
from ftcli.layout.batch import Origin
from ftcli.layout.build import build_posed
from ftcli.layout.model import TreeModel, inner_model
from ftcli.layout.probe import LayoutChoice
from ftcli.methods.context import AttachContext
from ftcli.methods.lora import Lora
from ftcli.methods.parameter_groups import trained_parameters
from ftcli.models.settings import Model
from ftcli.objectives.causal_lm import CausalLM
from ftcli.objectives.regularize.ewc import EWC, FisherRows
from ftcli.objectives.regularize.kl import KL, TopK
from ftcli.recipe.recipe import InitFrom, Recipe
from ftcli.training.assemble import ModelParts, attached, load_base, make_accelerator
from ftcli.training.regularizers import Place, regularizers_of
from ftcli.training.resources import held_bytes, teacher_kind

LORA = Lora(rank=2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("base"), optimizer={"kind": "sgd"}, lr=0.1, max_grad_norm=None)


def recipe_of(bench: Bench, method: Any, regularizer: Any, **model: Any) -> Recipe:
    changed = Model.model_validate(bench.recipe.model.model_dump() | model)
    return bench.recipe.model_copy(update={"method": method, "objective": CausalLM(regularize=(regularizer,)), "model": changed})


def parts_of(recipe: Recipe) -> tuple[Any, ModelParts]:
    """The tokenizer of a recipe, and its model with its method."""
    tokenizer = recipe.model.load_tokenizer()
    base = load_base(recipe, tokenizer, torch.device("cpu"))
    module = attached(recipe, base, AttachContext(seed=5, tokenizer=tokenizer))
    return tokenizer, ModelParts(module, TreeModel(module, "forest"), LayoutChoice("forest", "a Llama"), 0.1)


def at_work(bench: Bench, recipe: Recipe, folder: Path | None = None) -> tuple[Any, ModelParts]:
    """The recipe's one regularizer, and the model it is to hold."""
    tokenizer, parts = parts_of(recipe)
    data = replace(bench.data, tokenizer=tokenizer)
    if folder is not None:
        store = data.prepared.train[0]
        data = replace(data, prepared=replace(data.prepared, train=(_Elsewhere(store, folder),)))

    def base_of(other: Recipe) -> Any:
        return load_base(other, tokenizer, torch.device("cpu"))

    (found,) = regularizers_of(recipe, data, parts, make_accelerator(recipe, None), base_of, Place())
    return found, parts


class _Elsewhere:
    """A store that keeps what is computed of it in another folder."""

    def __init__(self, store: Any, folder: Path) -> None:
        self._store, self.folder = store, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __len__(self) -> int:
        return len(self._store)


def batch_of(bench: Bench) -> Any:
    store = bench.data.prepared.train[0]
    posed = [bench.recipe.objective.pose(store.tree(index)) for index in range(8)]
    return replace(build_posed("forest", posed), origin=Origin(1, tuple((0, index) for index in range(8))))


def log_probs(model: TreeModel, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.hidden_states(batch)[batch.predict_from]
        return model.transform(inner_model(model.module).get_output_embeddings()(hidden)).log_softmax(-1)


def train_all(parts: ModelParts, size: float = 0.05) -> None:
    """Every trained parameter a little off."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in trained_parameters(parts.module):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


TOKENS = {"tokens": ("quinquereme", "Nineveh")}
BESIDE: dict[str, tuple[Any, dict[str, Any]]] = {
    "rows": (LORA, {"add_tokens": TOKENS}),
    "all rows": (LORA, {"add_tokens": {**TOKENS, "train": "all"}}),
    "whole modules": (Lora(rank=2, extra_trained_modules=("embed_tokens", "lm_head", "norm")), {}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_kl_is_to_the_base_whatever_trains_beside_the_adapter(bench: Bench, name: str) -> None:
    method, model = BESIDE[name]
    recipe = recipe_of(bench, method, KL(), **model)
    penalty, parts = at_work(bench, recipe)
    batch = batch_of(bench)
    base = load_base(recipe, recipe.model.load_tokenizer(), torch.device("cpu"))
    theirs = log_probs(TreeModel(base, "forest"), batch)
    assert abs(float(parts.model(batch, [penalty])[1])) < 1e-6
    train_all(parts)
    ours = log_probs(parts.model, batch)
    expected = float(((theirs.exp() * (theirs - ours)).sum(-1) * batch.weights).sum())
    assert expected > 0.1
    assert float(parts.model(batch, [penalty])[1]) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(log_probs(parts.model, batch), ours)


def test_after_an_earlier_run_the_base_is_loaded_beside_what_began_as_something_else(bench: Bench) -> None:
    """What trains in place begins as the earlier run has left it: only a copy knows what it was."""
    settings = {method: recipe_of(bench, LORA, KL(), **model) for method, model in (("rows", {"add_tokens": TOKENS}), ("plain", {}))}
    begun = InitFrom(path="runs/earlier")
    found = {}
    for name, recipe in settings.items():
        module = parts_of(recipe)[1].module
        later = recipe.model_copy(update={"init_from": begun})
        found[name] = teacher_kind("base", recipe, module), teacher_kind("base", later, module)
        size = sum(p.numel() * p.element_size() for p in module.parameters()) if name == "rows" else 0
        assert held_bytes(later, module) == size
    assert found == {"rows": ("off", "other"), "plain": ("off", "off")}


def test_memory_counts_what_trains_in_place(bench: Bench) -> None:
    def held(**add_tokens: Any) -> int:
        recipe = recipe_of(bench, LORA, KL(), **({"add_tokens": {**TOKENS, **add_tokens}} if add_tokens else {}))
        return held_bytes(recipe, parts_of(recipe)[1].module)

    width, vocabulary = bench.recipe.model.init.config["hidden_size"], bench.data.tokenizer.vocab_size + 2  # type: ignore[union-attr]
    assert held() == 0
    assert held(train="rows") in (4 * 2 * width, 2 * 4 * 2 * width)
    assert held(train="all") in (4 * vocabulary * width, 2 * 4 * vocabulary * width)


def kept(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


SCALED: tuple[dict[str, Any], ...] = (
    {"rope": {"kind": "linear", "factor": 4.0}},
    {"rope": {"kind": "linear", "factor": 8.0}},
    {"dtype": "bfloat16"},
    {"add_tokens": {**TOKENS, "train": "none"}},
    {"add_tokens": {**TOKENS, "train": "none", "descriptions": {"Nineveh": "an old city"}}},
)


def test_answers_are_found_again_by_the_same_model_alone(bench: Bench, tmp_path: Path) -> None:
    regularizer = KL(cache=TopK(top_k=4))
    for number, model in enumerate(({}, *SCALED), start=1):
        at_work(bench, recipe_of(bench, LORA, regularizer, **model), tmp_path)
        assert len(kept(tmp_path, "teacher-*")) == number, model
    at_work(bench, recipe_of(bench, LORA, regularizer), tmp_path)
    at_work(bench, recipe_of(bench, Lora(rank=4, alpha=3.0), regularizer), tmp_path)  # with the adapter off it is the same model
    assert len(kept(tmp_path, "teacher-*")) == len(SCALED) + 1


def test_answers_of_the_first_weights_are_those_of_one_method(bench: Bench, tmp_path: Path) -> None:
    regularizer = KL(teacher="start", cache=TopK(top_k=4))
    for alpha in (3.0, 5.0, 3.0):
        at_work(bench, recipe_of(bench, Lora(rank=2, alpha=alpha), regularizer), tmp_path)
    assert len(kept(tmp_path, "teacher-*")) == 2


def test_fisher_information_is_found_again_by_the_same_model_and_method_alone(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftcli.training import regularizers

    monkeypatch.setattr(regularizers._Making, "_fisher_stores", lambda making, settings: making.data.prepared.train)
    settings = EWC(examples=2, labels="data", rows=FisherRows(source=Builtin(name="stories")))
    recipes: list[Callable[[], Recipe]] = [
        lambda: recipe_of(bench, LORA, settings),
        lambda: recipe_of(bench, Lora(rank=2, alpha=30.0), settings),  # scales every gradient, and no weight knows of it
        lambda: recipe_of(bench, LORA, settings, rope={"kind": "linear", "factor": 4.0}),
    ]
    for number, recipe in enumerate(recipes, start=1):
        at_work(bench, recipe(), tmp_path)
        at_work(bench, recipe(), tmp_path)
        assert len(kept(tmp_path, "fisher-*")) == number


def test_a_kl_that_rounding_makes_negative_is_zero(bench: Bench) -> None:
    for seed in range(3):
        recipe = recipe_of(bench, LORA, KL(temperature=3.0))
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
        penalty, parts = at_work(bench, recipe)
        train_all(parts, 1e-6)
        added = parts.model(batch_of(bench), [penalty])[1]
        assert float(added) >= 0
        assert not str(float(added)).startswith("-")


def test_a_teacher_that_is_not_there_is_refused_by_its_key(bench: Bench) -> None:
    recipe = recipe_of(bench, LORA, KL(teacher="/nowhere"))
    with pytest.raises(RequestError, match=r"objective\.regularize\.teacher: `/nowhere` is no folder"):
        at_work(bench, recipe)
    with pytest.raises(RequestError, match=r"objective\.regularize\.teacher: `/nowhere` is no folder"):
        held_bytes(recipe, parts_of(recipe)[1].module)
