"""What a rule says of a run: a finding with its evidence and what to try next, or why it cannot say anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a run."""

    name: str
    """The rule that found it, as `overfitting`."""
    sentence: str
    """What is wrong, in words."""
    evidence: tuple[str, ...]
    """Numbers and steps that show it."""
    advice: tuple[str, ...]
    """What to try next, the likeliest cure first."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Unjudged:
    """A rule that had nothing to go by."""

    why: str


Verdict = Finding | Unjudged | None
"""None: the rule looked, and all is well."""
