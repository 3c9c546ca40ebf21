"""mergekit's long form of a model, `{model: {path, revision}, lora: {path, revision}}`, as the one line that it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftcli.errors import did_you_mean
from ftcli.recipe.yaml import KeyPath, describe

_KEYS, _PLACE_KEYS = ("model", "lora"), ("path", "revision")
Fault = tuple[KeyPath, str, str | None]
"""Where in the mapping, what is wrong, and a hint."""


def short_form(value: Mapping[str, Any]) -> tuple[str, list[Fault]]:
    """`path@revision+lora`, and what is wrong with the mapping.

    Example:
        >>> short_form({"model": {"path": "org/a", "revision": "main"}, "lora": "org/l"})
        ('org/a@main+org/l', [])
    """
    faults: list[Fault] = []
    for key in value:
        if key == "override_architecture":
            faults.append(((key,), "mergekit needs this key for its descriptions of architectures; ftcli has none", "remove it"))
        elif key not in _KEYS:
            faults.append(((key,), "unknown key", did_you_mean(str(key), _KEYS) or f"keys here: {', '.join(_KEYS)}"))
    if "model" not in value:
        faults.append(((), "missing key `model`", "{model: {path: MODEL}}, or only the model's name"))
    parts = [_place(value[key], (key,), faults) for key in _KEYS if value.get(key) is not None]
    return "+".join(parts), faults


def _place(value: Any, path: KeyPath, faults: list[Fault]) -> str:
    """`path@revision` of a text or a mapping."""
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, dict):
        faults.append((path, f"found {describe(value)}, allowed: text, or a mapping with `path`", None))
        return ""
    for key in value:
        if key not in _PLACE_KEYS:
            faults.append(((*path, key), "unknown key", did_you_mean(str(key), _PLACE_KEYS) or f"keys here: {', '.join(_PLACE_KEYS)}"))
    name, revision = value.get("path"), value.get("revision")
    for key, found in (("path", name), *([] if revision is None else [("revision", revision)])):
        if not isinstance(found, str):
            faults.append(((*path, key) if key in value else path, f"found {describe(found)} as `{key}`, allowed: text", None))
    return f"{name}@{revision}" if revision is not None else str(name)
