"""The recipe as text: what is written reads back, differences are named, and the JSON schema knows what the loader knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftcli.errors import RecipeError
from ftcli.recipe.load import load_recipe
from ftcli.recipe.recipe import Recipe
from ftcli.recipe.schema import EDITOR_LINE, homes, json_schema, kinds, resolved
from ftcli.recipe.write import recipe_difference, resolved_yaml
from ftcli.recipe.yaml import parse

ROOT = Path(__file__).parents[2]

GOOD = """\
version: 1
name: orders
model: {base: "builtin:tiny", template: "{% for m in messages %}\\n{{ m.content }}\\n{% endfor %}\\n"}
data:
  train:
    - {source: {kind: file, path: orders.jsonl}, format: {kind: chat}}
    - {source: {kind: builtin, name: stories}, role: replay, weight: 0.1}
  evaluation:
    - {name: "on", source: {kind: file, path: "x: y.jsonl"}, generate: {metrics: [{kind: exact-match}]}}
method: {kind: lora, rank: 8, rank_pattern: {"layers.0": 4}, target_modules: [q_proj, v_proj]}
train: {lr: 1e-4, steps: 40, optimizer: {kind: lion}}
output: out/run
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return loaded(tmp_path, GOOD)


def loaded(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides).recipe


def test_a_resolved_recipe_loads_as_the_same_recipe_from_any_folder(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    text = resolved_yaml(recipe)
    assert text.startswith(EDITOR_LINE + "\n")
    assert loaded(folder, text) == recipe
    assert resolved_yaml(loaded(folder, text)) == text


def test_a_resolved_recipe_names_every_field(recipe: Recipe) -> None:
    document = parse(resolved_yaml(recipe)).data
    assert list(document["train"]) == list(type(recipe.train).model_fields)
    assert next(iter(document["method"])) == "kind"


def test_equal_recipes_do_not_differ(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe_difference(recipe, loaded(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.lr=2e-4", "train.lr: 1e-4 -> 2e-4"),
        ("train.lr=0.05", "train.lr: 1e-4 -> 0.05"),
        ("train.lr=1e-4", None),
        ("train.steps=80", "train.steps: 40 -> 80"),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing: false -> true"),
        ("train.optimizer={kind: sgd}", "train.optimizer: {kind: lion} -> {kind: sgd}"),
        ("method={kind: full}", None),
        ("method.rank_pattern={layers.1: 2}", "method.rank_pattern.layers.0: 4 -> absent"),
        ("method.target_modules=all-linear", "method.target_modules: [q_proj, v_proj] -> all-linear"),
        ("data.train.1.weight=1", "data.train.1.weight: 0.1 -> 1"),
        ("data.evaluation=[]", "data.evaluation.0: {source: {kind: file, path: "),
        ("trackers=[wandb]", "trackers: [] -> [wandb]"),
        ("output=", "output: "),
    ],
)
def test_a_difference_is_one_line_with_both_values(recipe: Recipe, tmp_path: Path, override: str, line: str | None) -> None:
    lines = recipe_difference(recipe, loaded(tmp_path, GOOD, override))
    if override == "train.lr=1e-4":
        assert lines == []
    elif override.startswith("method={"):
        start = "method: {kind: lora, rank: 8, target_modules: [q_proj, v_proj], rank_pattern: {layers.0: 4}} -> {kind: full}"
        assert lines == [start]
    else:
        assert line is not None
        assert lines[0].startswith(line)


def test_the_schema_is_a_valid_draft_2020_12_schema() -> None:
    validators = pytest.importorskip("jsonschema.validators")
    validators.Draft202012Validator.check_schema(json_schema())
    assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_field_of_the_schema_is_explained_and_every_mapping_closed() -> None:
    root = json_schema()
    for name, definition in {**root["$defs"], "Recipe": root}.items():
        if definition.get("type") != "object":
            continue
        assert definition.get("additionalProperties") is False, name
        fields = definition["properties"].items()
        unexplained = [key for key, field in fields if key != "kind" and "description" not in resolved(field, root)]
        assert not unexplained, f"{name}: fields without a docstring: {unexplained}"


def test_editors_are_told_to_require_kind_and_offer_every_kind() -> None:
    root = json_schema()
    for choices in (
        kinds(resolved(root["properties"]["method"], root), root),
        kinds(root["$defs"]["Train"]["properties"]["schedule"], root),
    ):
        assert len(choices) > 2
        assert all("kind" in choice["required"] for choice in choices.values())


def test_homes_know_where_each_key_belongs() -> None:
    assert homes()["lr"] == ((("train",), None),)
    assert {kind for _, kind in homes()["rank"]} == {"adalora", "lora", "qlora", "galore", "apollo"}


def jsonschema_errors(document: Any) -> list[str]:
    validators = pytest.importorskip("jsonschema.validators")
    return [error.message for error in validators.Draft202012Validator(json_schema()).iter_errors(document)]


def test_the_schema_takes_what_the_loader_takes(recipe: Recipe) -> None:
    assert jsonschema_errors(parse(GOOD).data) == []
    assert jsonschema_errors(parse(resolved_yaml(recipe)).data) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rank: 8", "rnak: 8"),
        ("lr: 1e-4", "lr: 0"),
        ("kind: lion", "kind: loin"),
        ("kind: lora, ", ""),
        ("steps: 40", "steps: on"),
        ("name: orders", "name: a b"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(tmp_path: Path, old: str, new: str) -> None:
    assert jsonschema_errors(parse(GOOD.replace(old, new)).data)
    with pytest.raises(RecipeError):
        loaded(tmp_path, GOOD.replace(old, new))


RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if not path.name.startswith(("compare-", "chain-")))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_of_the_project_loads_and_fits_the_schema(path: Path) -> None:
    assert path.read_text().startswith("# yaml-language-server: $schema=")
    assert jsonschema_errors(load_recipe(path).document) == []
