"""The evaluations of a search in a file of one line each: what was measured once is never measured again, also after a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftcli.errors import RunError

Scores = Mapping[str, Mapping[str, float]]
"""What each evaluation source measures."""
Candidate = Mapping[str, Any]
"""What is merged: plain values, which JSON holds exactly."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One candidate, measured."""

    candidate: Candidate
    scores: Scores
    value: float
    """What is made as large as possible."""


@dataclass(frozen=True)
class Judge:
    """Measures a candidate, and tells better from worse."""

    measure: Callable[[Candidate], Scores]
    value: Callable[[Scores], float]
    """Larger is better."""


@dataclass
class EvaluationLog:
    """A judge that remembers. The same search asks the same questions in the same order, so it goes on where it stopped."""

    judge: Judge
    path: Path | None = None
    """None keeps nothing."""
    fingerprint: str = ""
    """Of everything but the candidate that an evaluation depends on."""
    say: Callable[[Evaluation, int], None] = lambda evaluation, number: None
    evaluations: list[Evaluation] = field(default_factory=list)
    """Those that this search has asked for, in order, each once."""
    num_measured: int = 0
    """How many of them were not in the file."""
    _known: dict[str, Scores] = field(default_factory=dict)
    _asked: dict[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        if self.path.is_file():
            self._read(self.path)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"fingerprint": self.fingerprint})

    def __call__(self, candidate: Candidate) -> Evaluation:
        """The candidate's evaluation."""
        key = key_of(candidate)
        if key in self._asked:
            return self._asked[key]
        scores = self._known.get(key)
        if scores is None:
            scores = self.judge.measure(candidate)
            self.num_measured += 1
            self._append({"candidate": candidate, "scores": scores})
        evaluation = Evaluation(candidate, scores, self.judge.value(scores))
        self._asked[key] = evaluation
        self.evaluations.append(evaluation)
        self.say(evaluation, len(self.evaluations))
        return evaluation

    def best(self) -> Evaluation:
        """The best so far; of equal ones the first."""
        return max(self.evaluations, key=lambda evaluation: evaluation.value)

    def _read(self, path: Path) -> None:
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the process was killed
        if not entries or entries[0].get("fingerprint") != self.fingerprint:
            hint = "remove it, or write to another folder"
            raise RunError(f"`{path}` holds the evaluations of another search, other models or other data", hint=hint)
        self._known = {key_of(entry["candidate"]): entry["scores"] for entry in entries[1:]}
        # a line that was cut short would swallow the next one
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def key_of(candidate: Candidate) -> str:
    """The same text for the same candidate.

    Example:
        >>> key_of({"weight": [0.5, 0.5], "a": 1}) == key_of({"a": 1, "weight": [0.5, 0.5]})
        True
    """
    return json.dumps(candidate, sort_keys=True)


def fingerprint_of(*parts: Any) -> str:
    """A hash of whatever JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
