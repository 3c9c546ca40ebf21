"""The recipe language as a JSON schema: what editors check against, and the map by which errors find the right word.

Source: JSON Schema draft 2020-12.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ftcli.recipe.yaml import KeyPath

if TYPE_CHECKING:
    from ftcli.spec import Spec

SCHEMA_FILE = "recipe.schema.json"
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"

Node = dict[str, Any]
"""A part of the schema."""


def json_schema() -> Node:
    """The JSON schema of a recipe. Not to be changed by who gets it: there is one for the whole process."""
    from ftcli.recipe.recipe import Recipe

    return schema_of(Recipe, "ftcli recipe")


@cache
def schema_of(spec: type[Spec], title: str) -> Node:
    """The JSON schema of a kind of document."""
    schema = spec.model_json_schema()
    _require_kinds(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}


def _require_kinds(schema: Node) -> None:
    """Makes `kind` required in every choice: pydantic has a default for it, and no choice could be told from another without."""
    definitions = schema.get("$defs", {})
    for node in _nodes(schema):
        for reference in node.get("discriminator", {}).get("mapping", {}).values():
            choice = definitions[reference.rpartition("/")[2]]
            choice["required"] = sorted({"kind", *choice.get("required", ())})
            choice["properties"]["kind"].pop("default", None)


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _nodes(item)


def resolved(node: Node, root: Node) -> Node:
    """`node` behind its reference, or the one choice beside null, with its description kept."""
    while True:
        choices = [choice for choice in node.get("anyOf", ()) if choice.get("type") != "null"]
        inner = definition(node["$ref"], root) if "$ref" in node else choices[0] if len(choices) == 1 else None
        if inner is None:
            return node
        node = inner | {key: node[key] for key in ("description",) if key in node}


def definition(reference: str, root: Node) -> Node:
    node: Node = root["$defs"][reference.rpartition("/")[2]]
    return node


def kinds(node: Node, root: Node) -> dict[str, Node]:
    """The choices of a union on `kind`, by kind; empty if `node` is none."""
    mapping = node.get("discriminator", {}).get("mapping", {})
    return {kind: definition(reference, root) for kind, reference in mapping.items()}


def locate(location: Sequence[str | int], root: Node) -> tuple[KeyPath, Node, Node]:
    """Where in a document a location of pydantic's lies, and what the schema says there.

    Args:
        location: pydantic's `loc`: keys, indices, and between them the tags of unions, which no document contains.

    Returns:
        the path, the schema of the mapping or list around it, and its own schema (empty for an unknown key).
    """
    path: list[str | int] = []
    around = node = here = root
    for element in location:
        node = resolved(node, root)
        if choices := kinds(node, root):
            node = choices.get(str(element), {})
        elif "anyOf" in node:
            node = _chosen(element, node, root)
        elif node.get("type") in ("object", "array") and element != "[key]":
            path.append(element)
            around, node = node, _inside(element, node)
            here = node
        else:
            break  # the rest names pydantic's validators
    return tuple(path), around, resolved(here, root)


def _inside(element: str | int, node: Node) -> Node:
    inner = node.get("items") if isinstance(element, int) else node.get("properties", {}).get(element, node.get("additionalProperties"))
    return inner if isinstance(inner, dict) else {}


_LABELS = {"tuple": "array", "list": "array", "set": "array", "dict": "object", "str": "string", "int": "integer", "float": "number"}


def _chosen(label: str | int, node: Node, root: Node) -> Node:
    """The choice of a union without `kind` that pydantic calls `label`, such as `tuple[str, ...]`."""
    wanted = _LABELS.get(str(label).partition("[")[0])
    choices = [resolved(choice, root) for choice in node["anyOf"]]
    return next((choice for choice in choices if choice.get("type") == wanted or choice.get("title") == label), {})


@cache
def homes() -> dict[str, tuple[tuple[KeyPath, str | None], ...]]:
    """For every key of the language, the paths of the mappings that know it, with the kind that does."""
    root = json_schema()
    found: dict[str, list[tuple[KeyPath, str | None]]] = {}
    pending: list[tuple[KeyPath, str | None, Node]] = [((), None, root)]
    while pending:
        path, kind, node = pending.pop(0)
        node = resolved(node, root)
        pending += [(path, name, choice) for name, choice in kinds(node, root).items()]
        if "items" in node:
            pending.append(((*path, "N"), None, node["items"]))
        for key, inner in node.get("properties", {}).items():
            found.setdefault(key, []).append((path, kind))
            pending.append(((*path, key), None, inner))
    return {key: tuple(places) for key, places in found.items()}


def allowed(node: Node, root: Node) -> str:
    """What may stand at `node`, in words.

    Example:
        >>> allowed({"type": "boolean"}, {}), allowed({"type": "integer", "minimum": 1}, {}), allowed({"enum": ["a", "b"]}, {})
        ('true or false', 'a whole number, at least 1', 'a or b')
    """
    if choices := node.get("anyOf"):
        return _either([allowed(choice, root) for choice in choices])
    node = resolved(node, root)
    if names := list(kinds(node, root)):
        return f"a mapping with `kind` {_either(names)}"
    if "enum" in node or "const" in node:
        return _either([_written(value) for value in node.get("enum", [node.get("const")])])
    words = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text", "array": "a list"}
    words |= {"object": "a mapping", "null": "null"}
    return words.get(node.get("type", ""), "another value") + _limits(node)


def _limits(node: Node) -> str:
    if node.get("minItems"):
        return f" with at least {node['minItems']} {'entry' if node['minItems'] == 1 else 'entries'}"
    names = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {node[name]:g}" for name, word in names.items() if name in node]
    return (" " if limits[0].startswith(("above", "below")) else ", ") + " and ".join(limits) if limits else ""


def _either(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _written(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)
