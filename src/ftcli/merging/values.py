"""The value of a parameter: one for all tensors, a gradient over the layers, or different ones for different names and layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftcli.recipe.yaml import KeyPath


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Which tensor a value is for."""

    name: str
    """In the merged model."""
    layer: int | None
    """Of the merged model; None outside the layers."""
    depth: float
    """Where it stands in its slice: 0 is the first layer and what comes before it, 1 the last and what comes behind it."""


@dataclass(frozen=True)
class Conditional:
    """A value for the tensors it matches."""

    points: tuple[Any, ...]
    """One value, or those of a gradient."""
    path: KeyPath
    text: str | None = None
    """mergekit's filter: the name contains it."""
    pattern: re.Pattern[str] | None = None
    layers: tuple[int, int] | None = None
    """First and last (exclusive) layer of the merged model."""

    @property
    def is_conditional(self) -> bool:
        return self.text is not None or self.pattern is not None or self.layers is not None

    def matches(self, place: TensorPlace) -> bool:
        if self.text is not None and self.text not in place.name:
            return False
        if self.pattern is not None and self.pattern.search(place.name) is None:
            return False
        return self.layers is None or (place.layer is not None and self.layers[0] <= place.layer < self.layers[1])

    def at(self, depth: float) -> Any:
        """The value at a depth; numbers are interpolated, words and booleans jump."""
        if len(self.points) == 1:
            return self.points[0]
        position = depth * (len(self.points) - 1)
        lower = int(position)
        upper, share = min(len(self.points) - 1, lower + 1), position - lower
        first, second = self.points[lower], self.points[upper]
        if any(isinstance(point, bool) or not isinstance(point, int | float) for point in (first, second)):
            return first
        return first if share == 0 else (1 - share) * first + share * second


@dataclass(frozen=True)
class Setting:
    """Everything that one place of a recipe says of one parameter."""

    path: KeyPath
    entries: tuple[Conditional, ...]
    used: set[int] = field(default_factory=set, compare=False)
    """Which entries matched a tensor."""

    def at(self, place: TensorPlace) -> Any:
        """The first matching entry's value, None where none matches."""
        for index, entry in enumerate(self.entries):
            if entry.matches(place):
                self.used.add(index)
                return entry.at(place.depth)
        return None

    def unused(self) -> list[Conditional]:
        """Conditions that no tensor met."""
        return [entry for index, entry in enumerate(self.entries) if entry.is_conditional and index not in self.used]


def first_value(settings: Sequence[Setting | None], place: TensorPlace, default: Any) -> Any:
    """The value of the first setting that has one for this tensor."""
    for setting in settings:
        if setting is not None and (value := setting.at(place)) is not None:
            return value
    return default
