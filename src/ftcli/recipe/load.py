"""From a file and overrides to a frozen recipe, or to a list of everything that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftcli.errors import Problem, RecipeError, did_you_mean
from ftcli.recipe.checks import check_relations
from ftcli.recipe.explain import Finding, explain
from ftcli.recipe.overrides import apply_overrides
from ftcli.recipe.recipe import Recipe
from ftcli.recipe.yaml import Place, YamlError, decode, parse, where
from ftcli.units import MIB, format_bytes

MAX_BYTES = MIB  # recipes are a few KiB; what is larger is a data file, and would take seconds to parse


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and what it was made from."""

    recipe: Recipe
    text: str
    """The file as it is on disk, without the overrides."""
    path: Path
    document: dict[str, Any]
    """The parsed file with the overrides in it, before defaults."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe at `path` with `overrides` (``path.to.key=value``) applied; relative paths in it count from its folder.

    Raises:
        RecipeError: it cannot be read, or something in it is wrong; names every problem with its line.
    """
    text = _read(path)
    try:
        document = parse(text)
    except YamlError as error:
        raise _recipe_error(path, [error.problem]) from None
    overridden = apply_overrides(document.data, overrides)
    recipe, findings = _validate(overridden.data, path.resolve().parent)
    in_file = list(document.problems)
    in_overrides = list(overridden.problems)
    for path_found, what, hint in findings:
        if name := overridden.where(path_found):
            in_overrides.append(Problem(name, what, hint))
        else:
            place = document.place(path_found)
            in_file.append((place or Place(1, 1), Problem(where(path_found, place), what, hint)))
    problems = [problem for _, problem in sorted(in_file, key=lambda item: (item[0].line, item[0].column))] + in_overrides
    if recipe is None or problems:
        raise _recipe_error(path, problems)
    return LoadedRecipe(recipe, text, path, overridden.data)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"`{path}` is {format_bytes(path.stat().st_size)}: no recipe is larger than {format_bytes(MAX_BYTES)}")
        return decode(path.read_bytes())
    except FileNotFoundError:
        near = [str(other) for pattern in ("*.yaml", "*.yml") for other in sorted(path.parent.glob(pattern))]
        raise RecipeError(f"recipe `{path}` does not exist", hint=did_you_mean(str(path), near)) from None
    except IsADirectoryError:
        raise RecipeError(f"recipe `{path}` is a folder", hint="give the YAML file in it") from None
    except OSError as error:
        raise RecipeError(f"recipe `{path}` cannot be read: {(error.strerror or str(error)).lower()}") from None
    except YamlError as error:
        raise _recipe_error(path, [error.problem]) from None


def _validate(data: dict[str, Any], folder: Path) -> tuple[Recipe | None, list[Finding]]:
    """The recipe that `data` is, if nothing of one key alone is wrong, and every finding."""
    try:
        # JSON mode is strict about types and still takes lists for tuples
        recipe = Recipe.model_validate_json(json.dumps(data), context={"folder": folder})
    except ValidationError as error:
        findings = explain(error.errors(include_url=False, include_input=False), data)
        known = {finding[0] for finding in findings}
        return None, findings + [finding for finding in check_relations(data) if finding[0] not in known]
    return recipe, check_relations(data)


def _recipe_error(path: Path, problems: Sequence[Problem]) -> RecipeError:
    return RecipeError(f"recipe `{path}` has {len(problems)} problem{'s' if len(problems) != 1 else ''}", problems)
