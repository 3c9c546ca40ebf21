"""`--set path.to.key=value`: edits of the parsed document, before it is validated like any other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftcli.errors import Problem
from ftcli.recipe.yaml import KeyPath, YamlError, describe, dotted, parse_value


@dataclass(slots=True)
class Overridden:
    """A document after its overrides."""

    data: dict[str, Any]
    wheres: dict[KeyPath, str] = field(default_factory=dict)
    """`--set a.b` for every path that an override wrote or had to make."""
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: KeyPath) -> str | None:
        """How to name `path` in an error if an override wrote it, else None."""
        for length in range(len(path), 0, -1):
            if name := self.wheres.get(path[:length]):
                return name if length == len(path) else f"{dotted(path)} ({name})"
        # An unknown kind is told of the mapping whose kind it is.
        return self.wheres.get((*path, "kind"))


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> Overridden:
    """A copy of `data` with every `path.to.key=value` set, in their order; the value is YAML.

    Keys that are not there are made, whatever they are called: validation knows the keys. List entries are counted from 0.
    """
    result = Overridden(copy.deepcopy(data))
    for override in overrides:
        name, equals, text = override.partition("=")
        where = f"--set {name}"
        if not equals or not name.strip():
            result.problems.append(Problem(f"--set {override}", "has no `=`" if name.strip() else "has no key", "--set train.lr=1e-4"))
            continue
        try:
            value = parse_value(text)
        except YamlError as error:
            result.problems.append(Problem(where, f"`{text}`: {error.problem.what}", error.problem.hint))
            continue
        problem = _set(result, name.strip().split("."), value, where)
        if problem is not None:
            result.problems.append(Problem(where, *problem))
    return result


def _set(result: Overridden, keys: list[str], value: Any, where: str) -> tuple[str, str | None] | None:
    """Writes `value` at `keys`; what is wrong and a hint if that cannot be."""
    container: Any = result.data
    path: KeyPath = ()
    for depth, key in enumerate(keys):
        index: str | int = key
        if isinstance(container, list):
            if not key.isdecimal() or int(key) >= len(container):
                entries = f"entries 0 to {len(container) - 1}" if container else "no entries"
                return f"no entry `{key}` in `{dotted(path)}`", f"it has {entries}"
            index = int(key)
        elif not isinstance(container, dict):
            return f"`{dotted(path)}` is {describe(container)}, not a mapping", None
        path = (*path, index)
        if depth == len(keys) - 1:
            container[index] = value
            result.wheres[path] = where
        else:
            if isinstance(container, dict) and container.get(key) is None:
                container[index] = {}
                result.wheres[path] = where
            container = container[index]
    return None
