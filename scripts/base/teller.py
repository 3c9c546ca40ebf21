"""A teller keeps track of who was mentioned last, so that a story can say *she* where that is clear."""

from __future__ import annotations

import re

from base.dice import Dice, fill, tidy
from base.world import Person

_OWN = re.compile(r"^([A-Z])\.(name|he|him|his|self|He|His)$")
_CAST = re.compile(r"\{([A-Z])[.}]")


class Teller:
    """Collects a story sentence by sentence.

    In a template `{A}` is person A as the subject: by name, or *he* / *she* when A was the last subject and nobody else near could be meant.
    `{A.name}`, `{A.he}`, `{A.him}`, `{A.his}`, `{A.self}` are taken as they stand; other slots come from the facts of the story.
    """

    def __init__(self, dice: Dice, cast: dict[str, Person], **facts: object) -> None:
        self.dice = dice
        self.cast = cast
        self.facts = dict(facts)
        self._paragraphs: list[list[str]] = [[]]
        self._subject = ""
        self._near: set[str] = set()
        self._named_here: set[str] = set()
        self._met: set[str] = set()

    def has_met(self, template: str) -> bool:
        """Whether everyone in `template` has been mentioned in the story so far."""
        return {*_CAST.findall(template)} <= self._met

    def say(self, *templates: str, **facts: object) -> None:
        """Tell one of `templates`."""
        self._named_here = set()
        known = {**self.facts, **facts}

        def word_at(key: str) -> str:
            if key in self.cast:
                return self._subject_word(key)
            own = _OWN.match(key)
            if own and own[1] in self.cast:
                if own[2] == "name":
                    self._named_here.add(own[1])
                word = str(getattr(self.cast[own[1]], own[2].lower()))
                return word.capitalize() if own[2][0].isupper() else word
            return str(known[key])

        # A fact may have slots of its own, so the slots are filled twice.
        text = fill(fill(self.dice.expand(self.dice.one(templates)), word_at), word_at)
        self._paragraphs[-1].append(text)
        self._met |= self._named_here
        self._near = self._named_here | ({self._subject} if self._subject else set())

    def maybe(self, probability: float, *templates: str, **facts: object) -> None:
        if self.dice.chance(probability):
            self.say(*templates, **facts)

    def paragraph(self) -> None:
        if self._paragraphs[-1]:
            self._paragraphs.append([])
            self._near = {*self.cast}

    def text(self) -> str:
        return "\n\n".join(tidy(" ".join(sentences)) for sentences in self._paragraphs if sentences)

    def _subject_word(self, key: str) -> str:
        person = self.cast[key]
        rivals = {other for other in self._near | self._named_here if other != key and self.cast[other].he == person.he}
        is_clear = key == self._subject and not rivals
        self._subject = key
        if is_clear and self.dice.chance(0.75):
            return person.he
        self._named_here.add(key)
        return person.name
