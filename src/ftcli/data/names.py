"""Names of what several runs measure: the same rows have one name in all of them, and other rows another."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ftcli.data.settings import EvaluationSource
from ftcli.errors import Problem


@dataclass(frozen=True, slots=True)
class Listed:
    """An evaluation source as one of the runs lists it."""

    entry: EvaluationSource
    owner: str
    """Who lists it, for errors: "stage `task`"."""
    where: str | None
    """The key in the user's file; None for rows that a run holds out by itself: their name gives way."""

    @property
    def given_name(self) -> str | None:
        """The name that the user gave it."""
        return None if self.where is None else self.entry.name


def rows_of(entry: EvaluationSource) -> str:
    """What the rows of a source are, as far as its settings tell, whatever it is called and measured for."""
    return json.dumps(entry.model_dump(mode="json", include={"source", "format", "limit", "holdout"}), sort_keys=True)


def names_apart(listed: Sequence[Listed]) -> tuple[dict[str, str], list[Problem]]:
    """For all `rows_of` their name, and what is wrong with the names that were given.

    Where none was given it is made from the source, `-2` and so on behind it where other rows are called so; what is listed later changes
    no name made before, unless the user gives that very name to it.
    """
    names: dict[str, str] = {}
    first: dict[str, Listed] = {}
    problems = []
    for one in listed:
        name, rows = one.given_name, rows_of(one.entry)
        if name is None:
            continue
        if names.get(rows, name) != name:
            what = f"`{name}` is called `{names[rows]}` in {first[names[rows]].owner}: the same rows under two names"
            problems.append(Problem(f"{one.where}.name", what, f"call it `{names[rows]}` here, too"))
        elif rows_of(first.setdefault(name, one).entry) != rows:
            what = f"`{name}` of {one.owner} is the name of other rows in {first[name].owner}"
            problems.append(Problem(f"{one.where}.name", what, "give each its own name"))
        else:
            names[rows] = name
    for one in listed:
        rows = rows_of(one.entry)
        if rows not in names:
            label = one.entry.name or one.entry.source.label()
            names[rows] = free_name(label, names.values())
    return names, problems


def free_name(label: str, taken: Iterable[str]) -> str:
    """`label`, or `label-2` and so on where it is taken."""
    known = set(taken)
    names = itertools.chain([label], (f"{label}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in known)
