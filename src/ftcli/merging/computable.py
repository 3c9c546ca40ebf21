"""Tensors of dtypes that nothing is computed with: copied where that is what is asked for, and refused where it is not.

Whole numbers and booleans are buffers, of which models of one kind have the same. Everything else is a weight: of 8-bit floats a merge
would have to guess how they are scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ftcli.errors import Problem
from ftcli.merging.layers import is_buffer
from ftcli.merging.numbers import STORED
from ftcli.merging.planned import Input
from ftcli.merging.sources import Source
from ftcli.merging.tied_head import are_same

_LISTED = 3


def is_kept(name: str, dtype: str) -> bool:
    """True for what is no weight: a buffer by its name, or whole numbers and booleans that are called no weight."""
    return is_buffer(name) or (dtype[0] in "IUB" and dtype not in STORED and "weight" not in name.rpartition(".")[2])


def stranger(sources: Sequence[Source], items: Sequence[Input]) -> Input | None:
    """The first of some tensors that cannot be computed with; None where there is none."""
    found = (item for item in items if sources[item.source].tensor(item.name).dtype not in STORED)
    return next(found, None)


def are_all_same(sources: Sequence[Source], items: Sequence[Input]) -> bool:
    """True when tensors are equal bit for bit and nothing is added to them; those that are still on the hub are not known to be."""
    if any(sources[item.source].remote is not None or not sources[item.source].is_as_stored(item.name) for item in items):
        return False
    first, *others = [sources[item.source].tensor(item.name) for item in items]
    return all(are_same(first, other) for other in others)


def uncomputable(sources: Sequence[Source], found: Mapping[str, Input]) -> list[Problem]:
    """What is wrong with tensors that would have to be computed with and cannot be, a sentence for each dtype of each model.

    Args:
        found: by the name in the merged model.
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for item in found.values():
        groups.setdefault((item.source, sources[item.source].tensor(item.name).dtype), []).append(item.name)
    problems = []
    for (source, dtype), names in groups.items():
        listed = ", ".join(f"`{name}`" for name in names[:_LISTED]) + (f" ... and {len(names) - _LISTED} more" if names[_LISTED:] else "")
        what = f"its weights are stored as {dtype}, which cannot be merged: {listed}"
        hint = f"save the model as bfloat16 or float32 first and merge that; what can be merged: {', '.join(STORED)}"
        problems.append(Problem(sources[source].reference, what, hint))
    return problems
