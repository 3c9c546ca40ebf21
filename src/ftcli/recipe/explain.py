"""Turns what pydantic finds wrong into problems: the path as it was written, the value, what is allowed, a hint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftcli.errors import did_you_mean
from ftcli.recipe.schema import Node, allowed, homes, json_schema, kinds, locate, resolved
from ftcli.recipe.yaml import KeyPath, describe, dotted, scalar

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Finding = tuple[KeyPath, str, str | None]
"""KeyPath of what is wrong, what is wrong, hint."""


def explain(errors: Sequence[ErrorDetails], data: dict[str, Any]) -> list[Finding]:
    """One finding for each thing that is wrong, in the order of the errors.

    Args:
        errors: of validating `data` as a recipe; a union without `kind` gives several for one value.
        data: the document.
    """
    findings: dict[tuple[KeyPath, str], Finding] = {}
    for error in errors:
        # pydantic counts a list's valid items only: a long list of wrong ones is "too short", too
        if error["type"] == "too_short" and error["ctx"]["actual_length"] < len(value_at(data, _path(error)) or ()):
            continue
        path, what, hint = _finding(error, data)
        findings.setdefault((path, what), (path, what, hint))
    return list(findings.values())


def _path(error: ErrorDetails) -> KeyPath:
    return locate(error["loc"], json_schema())[0]


def _finding(error: ErrorDetails, data: dict[str, Any]) -> Finding:
    root = json_schema()
    path, around, node = locate(error["loc"], root)
    match error["type"]:
        case "extra_forbidden":
            return path, "unknown key", _unknown_key_hint(path, around, data)
        case "missing":
            return path[:-1], f"missing key `{path[-1]}`", _missing_key_hint(str(path[-1]), node, root)
        case "union_tag_not_found":
            return path, "missing key `kind`", f"kinds: {', '.join(kinds(node, root))}"
        case "union_tag_invalid":
            return _unknown_kind(path, list(kinds(node, root)), data)
        case "literal_error" if path and path[-1] == "kind":
            return _unknown_kind(path[:-1], _constants(node), data)
        case "value_error" | "assertion_error":
            return path, str(error.get("ctx", {}).get("error", error["msg"])), None
    value = value_at(data, path)
    return path, f"found {describe(value)}, allowed: {allowed(node, root)}", _value_hint(value, node, root)


def value_at(data: Any, path: KeyPath) -> Any:
    """What stands at `path`, None where nothing does."""
    for element in path:
        is_there = element in data if isinstance(data, dict) else isinstance(data, list) and element in range(len(data))
        if not is_there:
            return None
        data = data[element]
    return data


def _unknown_kind(path: KeyPath, names: list[str], data: dict[str, Any]) -> Finding:
    found = value_at(data, (*path, "kind"))
    return path, f"unknown kind `{found}`", did_you_mean(str(found), names) or f"kinds: {', '.join(names)}"


def _constants(node: Node) -> list[str]:
    return [str(value) for value in node.get("enum", [node.get("const")])]


def _unknown_key_hint(path: KeyPath, around: Node, data: dict[str, Any]) -> str:
    """Where the key belongs, or which key is meant, or which keys there are."""
    key, parent = str(path[-1]), tuple("N" if isinstance(element, int) else element for element in path[:-1])
    siblings = list(around.get("properties", {}))
    places = homes().get(key, ())
    if other_kinds := [kind for place, kind in places if place == parent and kind is not None]:
        own = value_at(data, (*path[:-1], "kind"))
        return f"`{key}` belongs to kind {', '.join(f'`{kind}`' for kind in other_kinds)}, not `{own}`"
    parents = list(dict.fromkeys(place for place, _ in places if key != "kind"))
    if 0 < len(parents) <= 3:
        named = [f"`{dotted(place)}`" if place else "the top level" for place in parents]
        return f"`{key}` belongs under {' or '.join(named)}" if parents != [()] else f"`{key}` belongs at the top level"
    return did_you_mean(key, siblings) or _misspelt_elsewhere(key) or f"keys here: {', '.join(siblings)}"


def _misspelt_elsewhere(key: str) -> str | None:
    if len(key) < 4 or (hint := did_you_mean(key, list(homes()))) is None:
        return None
    near = hint.split("`")[1]
    parent = homes()[near][0][0]
    return f"did you mean `{dotted((*parent, near))}`?"


def _missing_key_hint(key: str, node: Node, root: Node) -> str | None:
    if names := list(kinds(node, root)):
        return f"`{key}: {{kind: ...}}` with kind {', '.join(names)}"
    if "const" in node:
        return f"`{key}: {node['const']}`"
    description = _description(node)
    return f"`{key}`: {description}" if description else None


def _description(node: Node) -> str | None:
    """The field's docstring as a hint."""
    text = " ".join(str(node.get("description", "")).split()).removesuffix(".")
    return text[:1].lower() + text[1:] or None


_TRUTHS = {"yes": "true", "on": "true", "y": "true", "1": "true", "no": "false", "off": "false", "n": "false", "0": "false"}


def _value_hint(value: Any, node: Node, root: Node) -> str | None:
    """How to write what was probably meant."""
    types = {node.get("type")} | {resolved(choice, root).get("type") for choice in node.get("anyOf", ())}
    if isinstance(value, str):
        return _text_hint(value, node, root, types)
    if "integer" in types and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if "boolean" in types and value in (0, 1):
        return f"write {_TRUTHS[str(value)]}"
    if "array" in types and value is not None and not isinstance(value, list):
        return "put it in brackets: `[...]`"
    if types == {"string"} and isinstance(value, bool | int | float):
        return f'put it in quotes: "{value}"'
    return None


def _text_hint(text: str, node: Node, root: Node, types: set[Any]) -> str | None:
    if names := list(kinds(node, root)):
        return f"write `{{kind: {text}}}`" if text in names else did_you_mean(text, names)
    if "${" in text:
        return "`${...}` is replaced in paths and names only"
    if types & {"integer", "number"} and isinstance(scalar(text.strip()), int | float):
        return "write it without quotes"
    if "boolean" in types and text.lower() in {**_TRUTHS, "true": "", "false": ""}:
        return f"write {_TRUTHS.get(text.lower(), text.lower())}"
    if "enum" in node:
        return did_you_mean(text, _constants(node))
    if "array" in types:
        return f"put it in brackets: `[{text}]`"
    return None
