"""Chance with a fixed seed, and templates that it turns into English.

A template says `[one|another|]` for a choice, which may be nested, and `{slot}` for a word that the caller knows. Only `Random.random()` is
used beneath, the one method whose sequence Python promises to keep, so the same seed gives the same text on every version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from random import Random
from typing import TypeVar

T = TypeVar("T")
Node = str | tuple["Sequence_", ...]
Sequence_ = tuple["Node", ...]


class Dice:
    """A stream of choices named by its seed; streams of different names do not disturb each other."""

    def __init__(self, *name: object) -> None:
        self._random = Random(":".join(map(str, name)))  # a text seed goes through SHA-512, not through hash()

    def number(self, low: int, high: int) -> int:
        """A whole number in low..high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def one(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        rest = list(items)
        return [rest.pop(int(self._random.random() * len(rest))) for _ in range(count)]

    def expand(self, template: str) -> str:
        """`template` with every choice made; slots stay."""
        return self._walk(_parse(template))

    def say(self, template: str, **slots: object) -> str:
        """`template` as tidy English, choices made and slots filled."""
        return tidy(fill(self.expand(template), slots))

    def _walk(self, nodes: Sequence_) -> str:
        return "".join(node if isinstance(node, str) else self._walk(self.one(node)) for node in nodes)


_MARK = re.compile(r"[\[\]|]")


@cache
def _parse(template: str) -> Sequence_:
    stack: list[list[list[Node]]] = [[[]]]
    start = 0
    for match in _MARK.finditer(template):
        if match.start() > start:
            stack[-1][-1].append(template[start : match.start()])
        start = match.end()
        if match[0] == "[":
            stack.append([[]])
        elif match[0] == "|":
            stack[-1].append([])
        else:
            options = stack.pop()
            stack[-1][-1].append(tuple(tuple(option) for option in options))
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"unbalanced template: {template}")
    stack[0][0].append(template[start:])
    return tuple(stack[0][0])


_SLOT = re.compile(r"\{([A-Za-z_.]+)\}")


def fill(text: str, slots: Mapping[str, object] | Callable[[str], str]) -> str:
    """`text` with its slots replaced from a table or by a function."""
    find = slots if callable(slots) else lambda key: str(slots[key])
    return _SLOT.sub(lambda match: find(match[1]), text)


_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one\b|use|uni|Eu|eu)")
_SENTENCE = re.compile(r"((?:^|[.!?]|\.\"|[.!?]\" \"|\n)\s*\"?)([a-z])")
_SPACES = re.compile(r" {2,}")


def tidy(text: str) -> str:
    """Fix articles before vowels, sentence capitals and doubled spaces.

    A small letter after `!"` or `?"` stays: there a tag such as *she asked* follows.
    """
    text = _SPACES.sub(" ", text.strip()).replace(" ,", ",").replace(" .", ".")
    return _SENTENCE.sub(lambda match: match[1] + match[2].upper(), _ARTICLE.sub(r"\1n ", text))
