"""From what a recipe says in several places to the settings of one tensor.

The nearest place counts: a part's own parameters, then its slice's, its module's, the recipe's, the method's default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftcli.merging.methods.method import REQUIRED, Parameter
from ftcli.merging.randomness import plain_name
from ftcli.merging.recipe import MergeRecipe, Module, Part, Slice
from ftcli.merging.values import TensorPlace, first_value


@dataclass(frozen=True)
class Resolved:
    """The settings of one tensor."""

    settings: dict[str, Any]
    order: tuple[int, ...]
    """Which part comes first, second, and so on: for a symmetric method not the order they are written in."""
    labels: tuple[str, ...]
    """A name for each part, in that order; a model that is there twice has two."""


Wrong = Callable[[str, str, str | None], None]


def resolve(
    recipe: MergeRecipe, module: Module, piece: Slice, parts: Sequence[Part], place: TensorPlace, wrong: Wrong, warn: Callable[[str], None]
) -> Resolved | None:
    """The settings of one tensor, or None after telling `wrong` why there are none."""
    method = recipe.method
    fewest, most = method.num_models
    if not fewest <= len(parts) <= (most or len(parts)):
        allowed = str(fewest) if fewest == most else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        without = " besides the base" if method.base == "required" or (method.base == "optional" and (piece.base or recipe.base)) else ""
        wrong(recipe.where(piece.path), f"found {len(parts)} models{without}, `{method.name}` takes {allowed}", None)
        return None
    around = (piece.parameters, module.parameters, recipe.parameters)
    settings: dict[str, Any] = {}
    for parameter in method.parameters:
        shared = [parameters.get(parameter.name) for parameters in around]
        if parameter.per_model:
            values = [first_value([part.parameters.get(parameter.name), *shared], place, parameter.default) for part in parts]
            for part, value in zip(parts, values, strict=True):
                _check(recipe, part, parameter, value, place, wrong)
            settings[parameter.name] = tuple(values)
        else:
            settings[parameter.name] = first_value(shared, place, parameter.default)
            _check(recipe, piece, parameter, settings[parameter.name], place, wrong)
    if any(value is REQUIRED or (isinstance(value, tuple) and REQUIRED in value) for value in settings.values()):
        return None
    if (fault := method.fault(settings)) is not None:
        wrong(recipe.where(piece.path), fault, _cancel_hint(fault))
        return None
    order = _order(parts, settings, method.is_symmetric, method.parameters)
    for parameter in method.parameters:
        if parameter.per_model:
            settings[parameter.name] = tuple(settings[parameter.name][position] for position in order)
    return Resolved(settings, order, _labels([plain_name(parts[position].model) for position in order]))


def _cancel_hint(fault: str) -> str | None:
    return "other weights, or `normalize: false` where a sum and not a mean is meant" if "mean is not finite" in fault else None


def _check(recipe: MergeRecipe, owner: Part | Slice, parameter: Parameter, value: Any, place: TensorPlace, wrong: Wrong) -> None:
    if value is REQUIRED:
        hint = f"`{parameter.name}`: {parameter.help}"
        has_some = any(setting.path[-1] == parameter.name for setting in recipe.settings())
        what = f"`{parameter.name}` has no value for `{place.name}`" if has_some else f"`{parameter.name}` is missing"
        wrong(recipe.where(owner.path), what, "add a last entry without filter" if has_some else hint)


def _order(parts: Sequence[Part], settings: dict[str, Any], is_symmetric: bool, parameters: Sequence[Parameter]) -> tuple[int, ...]:
    if not is_symmetric:
        return tuple(range(len(parts)))
    own = [parameter.name for parameter in parameters if parameter.per_model]

    def key(position: int) -> tuple[str, ...]:
        return plain_name(parts[position].model), *(repr(settings[name][position]) for name in own)

    return tuple(sorted(range(len(parts)), key=key))


def _labels(models: Sequence[str]) -> tuple[str, ...]:
    """
    Example:
        >>> _labels(["a", "b", "a"])
        ('a', 'b', 'a#2')
    """
    counts: dict[str, int] = {}
    labels = []
    for model in models:
        counts[model] = counts.get(model, 0) + 1
        labels.append(model if counts[model] == 1 else f"{model}#{counts[model]}")
    return tuple(labels)
