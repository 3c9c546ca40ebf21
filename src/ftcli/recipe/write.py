"""Recipes as text: with every default filled in, and how two of them differ."""

from __future__ import annotations

from decimal import Decimal
from itertools import zip_longest
from typing import Any

from pydantic import BaseModel

from ftcli.recipe.recipe import Recipe
from ftcli.recipe.schema import EDITOR_LINE
from ftcli.recipe.yaml import dump


def resolved_yaml(recipe: Recipe) -> str:
    """`recipe` as YAML with every default filled in and every path absolute: loading it gives an equal recipe."""
    return f"{EDITOR_LINE}\n{dump(_kind_first(recipe.model_dump(mode='json')))}"


def _kind_first(value: Any) -> Any:
    """`value` with `kind` at the head of every mapping, as people write it."""
    if isinstance(value, list):
        return [_kind_first(item) for item in value]
    if isinstance(value, dict):
        return {key: _kind_first(value[key]) for key in sorted(value, key=lambda key: key != "kind")}
    return value


def recipe_difference(old: Recipe, new: Recipe) -> list[str]:
    """One line for every key that differs, ``train.lr: 1e-4 -> 2e-4``; empty if the recipes are equal.

    A choice that became another kind is one line with the settings that differ from that kind's defaults.
    """
    return _difference("", old, new)


def _difference(path: str, old: Any, new: Any) -> list[str]:
    pairs: list[tuple[str, Any, Any]]
    if isinstance(old, BaseModel) and type(old) is type(new):
        pairs = [(info.alias or key, getattr(old, key), getattr(new, key)) for key, info in type(old).model_fields.items()]
    elif isinstance(old, tuple) and isinstance(new, tuple) and any(isinstance(item, BaseModel) for item in (*old, *new)):
        pairs = [(str(index), *both) for index, both in enumerate(zip_longest(old, new, fillvalue=_ABSENT))]
    elif isinstance(old, dict) and isinstance(new, dict):
        pairs = [(str(key), old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in {**old, **new}]
    else:
        return [] if old == new and type(old) is type(new) else [f"{path}: {_text(old)} -> {_text(new)}"]
    prefix = f"{path}." if path else ""
    return [line for key, before, after in pairs for line in _difference(f"{prefix}{key}", before, after)]


class _Absent:
    """Stands where one of two recipes has nothing."""


_ABSENT = _Absent()


def _text(value: Any) -> str:
    """A value on one line, as it could be written in a recipe.

    Example:
        >>> _text(1e-4), _text(0.5), _text((1, "a")), _text({"rank": None}), _text(True)
        ('1e-4', '0.5', '[1, a]', '{rank: null}', 'true')
    """
    match value:
        case _Absent():
            return "absent"
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            return short_number(value)
        case BaseModel():
            kind = {"kind": value.kind} if hasattr(value, "kind") else {}
            return _text(kind | {name: getattr(value, name) for name in _changed(value)})
        case dict():
            return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
        case tuple() | list():
            return "[" + ", ".join(map(_text, value)) + "]"
        case _:
            return str(value)


def _changed(spec: BaseModel) -> list[str]:
    """The fields of `spec` that are not at their default."""
    return [name for name, info in type(spec).model_fields.items() if info.is_required() or getattr(spec, name) != info.default]


def short_number(value: float) -> str:
    """The shorter of the plain and the scientific way to write `value`; the plain one where they are equally long."""
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int), "a recipe holds finite numbers only"
    mantissa = str(digits[0]) + ("." + "".join(map(str, digits[1:])) if len(digits) > 1 else "")
    scientific = f"{'-' if sign else ''}{mantissa}e{exponent + len(digits) - 1}"
    return min(f"{value!r}".removesuffix(".0"), scientific, key=len)
