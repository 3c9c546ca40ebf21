"""The frozen, typo-proof base of everything a recipe can say."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


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


def _expand(text: str) -> str:
    """`text` with every ${NAME} replaced by the environment's value; an unset one is an error."""
    unset = [name for name in _VARIABLE.findall(text) if name not in os.environ]
    if unset:
        raise ValueError(f"environment variable {unset[0]} is not set")
    return _VARIABLE.sub(lambda match: os.environ[match[1]], text)


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
    return path if expanded.startswith(("/", ".", "~")) or Path(path).exists() else expanded


ExpandedName = Annotated[str, AfterValidator(_expand)]
"""A name in which ${ENV} is replaced."""
LocalPath = Annotated[str, AfterValidator(_resolve_path)]
"""A path or glob; relative ones count from the recipe's folder, ${ENV} and ~ are replaced."""
ModelReference = Annotated[str, AfterValidator(_resolve_reference)]
"""builtin:NAME, a local folder (relative ones count from the recipe's folder), or a hub id."""
