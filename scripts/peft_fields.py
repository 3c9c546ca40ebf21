"""Write src/ftcli/methods/peft_fields.py from the installed PEFT: `python scripts/peft_fields.py > src/ftcli/methods/peft_fields.py`."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

from ftcli.methods.peft_types import RUN_FIELDS, TYPES

HEADER = '''"""The fields of PEFT's configurations and their types, so that a recipe is checked without importing PEFT.

Made by `python scripts/peft_fields.py` from PEFT {version}; tests/unit/test_peft_kind.py compares it with the PEFT that is installed.
"""

FIELDS: dict[str, dict[str, str]] = {{'''
NAMES = {int: "integer", float: "number", bool: "boolean", str: "string", dict: "object", list: "array", type(None): "null"}


def main() -> None:
    import peft

    print(HEADER.format(version=peft.__version__))
    for name, fields in installed_fields().items():
        print(f'    "{name}": {{')
        for field, kind in fields.items():
            print(f'        "{field}": "{kind}",')
        print("    },")
    print("}")


def installed_fields() -> dict[str, dict[str, str]]:
    """For every type that ftcli takes, what the installed PEFT's configuration of it takes."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {name: fields_of(classes[name]) for name in TYPES}


def fields_of(config: type) -> dict[str, str]:
    """Type of each field that a recipe may think of, in words of JSON joined by `|`."""
    hints = typing.get_type_hints(config)
    return {
        field.name: "|".join(_in_order(words(hints[field.name])))
        for field in dataclasses.fields(config)
        if field.init and field.name not in RUN_FIELDS
    }


def _in_order(found: list[str]) -> list[str]:
    """Each word once, null last: the order of a union depends on which of its spellings a process has met first."""
    return sorted(set(found), key=lambda word: (word == "null", word))


def words(hint: Any) -> list[str]:
    """
    Example:
        >>> words(int | None), words(typing.Literal["a", "b"])
        (['integer', 'null'], ["'a'", "'b'"])
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return [repr(value) for value in arguments]
    if origin in (typing.Union, types.UnionType):
        # `str | SomeEnum` means the values of the enumeration
        found = [word for part in arguments for word in words(part)]
        has_values = any(word.startswith("'") for word in found)
        return [word for word in found if not (has_values and word == "string")]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [repr(member.value) for member in hint]
    if origin is list and arguments:
        return [f"array of {'/'.join(words(arguments[0]))}"]
    return [NAMES[origin or hint]]


if __name__ == "__main__":
    main()
