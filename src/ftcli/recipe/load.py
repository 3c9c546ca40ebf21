"""From a file and overrides to a frozen recipe, or to a list of everything that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ftcli.errors import Problem, RecipeError, did_you_mean
from ftcli.recipe.checks import check_following, check_relations
from ftcli.recipe.explain import Finding, explain
from ftcli.recipe.overrides import apply_overrides
from ftcli.recipe.recipe import Recipe
from ftcli.recipe.schema import schema_of
from ftcli.recipe.yaml import Place, YamlError, decode, parse, where
from ftcli.spec import Spec
from ftcli.units import MIB, format_bytes

Document = TypeVar("Document", bound=Spec)
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


def load_recipe(path: Path, overrides: Sequence[str] = (), *, follows: bool = False) -> LoadedRecipe:
    """The recipe at `path` with `overrides` (``path.to.key=value``) applied; relative paths in it count from its folder.

    Args:
        follows: its run goes on from another, and replays what that one has seen.

    Raises:
        RecipeError: it cannot be read, or something in it is wrong; names every problem with its line.
    """
    relations = check_following if follows else check_relations
    recipe, text, data = load_document(path, Recipe, "ftcli recipe", relations, overrides)
    return LoadedRecipe(recipe, text, path, data)


def load_document(
    path: Path, spec: type[Document], title: str, relations: Callable[[dict[str, Any]], list[Finding]], overrides: Sequence[str] = ()
) -> tuple[Document, str, dict[str, Any]]:
    """The settings in a YAML file of any kind, its text, and the parsed file with the overrides in it.

    Args:
        title: of the kind's JSON schema.
        relations: finds what contradicts each other.

    Raises:
        RecipeError: as `load_recipe`.
    """
    text = _read(path)
    try:
        document = parse(text)
    except YamlError as error:
        raise _recipe_error(path, [error.problem]) from None
    overridden = apply_overrides(document.data, overrides)
    found, findings = _validate(overridden.data, path.resolve().parent, spec, title, relations)
    in_file = list(document.problems)
    in_overrides = list(overridden.problems)
    for path_found, what, hint in findings:
        if name := overridden.where(path_found):
            in_overrides.append(Problem(name, what, hint))
        else:
            place = document.place(path_found)
            in_file.append((place or Place(1, 1), Problem(where(path_found, place), what, hint)))
    problems = [problem for _, problem in sorted(in_file, key=lambda item: (item[0].line, item[0].column))] + in_overrides
    if found is None or problems:
        raise _recipe_error(path, problems)
    return found, text, overridden.data


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


def _validate(
    data: dict[str, Any], folder: Path, spec: type[Document], title: str, relations: Callable[[dict[str, Any]], list[Finding]]
) -> tuple[Document | None, list[Finding]]:
    """The settings that `data` is, if nothing of one key alone is wrong, and every finding."""
    try:
        # JSON mode is strict about types and still takes lists for tuples
        found = spec.model_validate_json(json.dumps(data), context={"folder": folder})
    except ValidationError as error:
        findings = explain(error.errors(include_url=False, include_input=False), data, schema_of(spec, title))
        known = {finding[0] for finding in findings}
        return None, findings + [finding for finding in relations(data) if finding[0] not in known]
    return found, relations(data)


def _recipe_error(path: Path, problems: Sequence[Problem]) -> RecipeError:
    return RecipeError(f"recipe `{path}` has {len(problems)} problem{'s' if len(problems) != 1 else ''}", problems)
