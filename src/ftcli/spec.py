"""The frozen, typo-proof base of everything a recipe can say."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, WithJsonSchema


class Spec(BaseModel):
    """Settings, and the behaviour that reads them, in one class.

    Every field carries a docstring: it is the help text, the comment in the JSON schema and the hover text in an editor.
    Unknown keys are errors, types are strict, and nothing can be assigned after loading.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        validate_default=False,
        protected_namespaces=(),
    )


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What editors check while the name is typed: a variable may stand for any part of it.
_FOLDER_NAME_WRITTEN = r"^([A-Za-z0-9]|\$\{[A-Za-z_][A-Za-z0-9_]*\})([A-Za-z0-9._-]|\$\{[A-Za-z_][A-Za-z0-9_]*\})*$"


def _expand(text: str) -> str:
    """`text` with every ${NAME} replaced by the environment's value; an unset one is an error."""
    unset = [name for name in _VARIABLE.findall(text) if name not in os.environ]
    if unset:
        raise ValueError(f"environment variable {unset[0]} is not set")
    return _VARIABLE.sub(lambda match: os.environ[match[1]], text)


def _expand_name(text: str) -> str:
    """`text` with its variables replaced, if anything is left."""
    expanded = _expand(text)
    if not expanded.strip():
        raise ValueError("found an empty text, allowed: a name")
    return expanded


def _expand_folder_name(text: str) -> str:
    """`text` with its variables replaced, if it can be the name of a folder."""
    expanded = _expand(text)
    if not _FOLDER_NAME.fullmatch(expanded):
        made = "" if expanded == text else f" (from `{text}`)"
        allowed = "letters of a to z, digits, dots, dashes and underscores, the first of them a letter or digit"
        raise ValueError(f"found {f'`{expanded}`' if expanded else 'an empty text'}{made}, allowed: {allowed}")
    return expanded


def _resolve_path(text: str, info: ValidationInfo) -> str:
    """An absolute path; a relative one counts from the recipe's folder, which the loader gives as context."""
    folder = Path((info.context or {}).get("folder", Path.cwd()))
    return os.path.normpath(folder / Path(_expand(text)).expanduser())


def _resolve_reference(text: str, info: ValidationInfo) -> str:
    """A local folder as an absolute path; `builtin:NAME` and hub ids stay as they are."""
    expanded = _expand(text)
    if expanded.startswith("builtin:"):
        return expanded
    path = _resolve_path(text, info)
    # No hub id has two slashes: it is a folder, if one that is yet to be made.
    return path if expanded.startswith(("/", ".", "~")) or expanded.count("/") > 1 or Path(path).exists() else expanded


def _resolve_template(text: str, info: ValidationInfo) -> str:
    """A template itself and the name of a known one stay as they are; anything that looks like a file is a path."""
    is_template = "{%" in text or "{{" in text
    return text if is_template or not ("/" in text or "." in text or "$" in text) else _resolve_path(text, info)


ExpandedName = Annotated[str, AfterValidator(_expand_name)]
"""A name in which ${ENV} is replaced."""
FolderName = Annotated[str, AfterValidator(_expand_folder_name), WithJsonSchema({"type": "string", "pattern": _FOLDER_NAME_WRITTEN})]
"""A name that a folder gets, with ${ENV} replaced."""
LocalPath = Annotated[str, AfterValidator(_resolve_path)]
"""A path or glob; relative ones count from the recipe's folder, ${ENV} and ~ are replaced."""
ModelReference = Annotated[str, AfterValidator(_resolve_reference)]
"""builtin:NAME, a local folder (relative ones count from the recipe's folder), or a hub id."""
TemplateReference = Annotated[str, AfterValidator(_resolve_template)]
"""A Jinja template itself, the name of a known one, or a path to a file."""
