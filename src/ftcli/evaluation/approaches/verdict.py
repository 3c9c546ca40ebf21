"""What the numbers of a comparison say, in words: is it form or facts that was missing, and which approach is worth its cost?

Form is how to answer: a shape, a style, a habit of the task; training rows teach it. Facts are what to answer with: they stand in
documents, and change. The evidence is what each approach gains over the best one that neither trains nor looks anything up, on the same
rows. A gain counts where Holm's adjusted p is below 0.05; everything else is said to be not shown, never to be absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ftcli.evaluation.statistics import Comparison, Interval, holm
from ftcli.evaluation.tasks.task import Figure

Finding = Literal["form", "facts", "both", "neither", "open"]
LEVEL = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Approach:
    """As much of an approach as the verdict is made from."""

    name: str
    is_trained: bool
    looks_up: bool
    figure: Figure
    where: Sequence[str]
    """The rows, in the order of the figure's values."""
    cost: float
    """Tokens of a request."""
    changed: Interval | None = None
    """The figure after the facts changed, without training again."""

    @property
    def goodness(self) -> float:
        """The figure's value, turned so that more is better."""
        return self.figure.interval.value * (1 if self.figure.higher_is_better else -1)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two approaches on the same rows; a positive difference says that the first is better."""

    first: str
    second: str
    found: Comparison
    adjusted_p: float = 1.0

    @property
    def is_shown(self) -> bool:
        return self.adjusted_p < LEVEL

    @property
    def gains(self) -> bool:
        return self.is_shown and self.found.difference.value > 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said, and the comparisons it is said from."""

    finding: Finding
    sentences: tuple[str, ...]
    pairs: tuple[Pair, ...]


def judge(approaches: Sequence[Approach], figure: str, num_rows: int) -> Verdict:
    """The verdict on all approaches of a comparison.

    Args:
        figure: its name, for the sentences.
    """
    plain = _best(approaches, is_trained=False, looks_up=False)
    tuned = _best(approaches, is_trained=True, looks_up=False)
    looking = _best(approaches, is_trained=False, looks_up=True)
    both = _best(approaches, is_trained=True, looks_up=True)
    wanted = [(one, approaches[0]) for one in approaches[1:]]
    wanted += [(a, b) for a, b in ((tuned, plain), (looking, plain), (both, tuned), (both, looking), (tuned, looking)) if a and b]
    best = max(approaches, key=lambda one: one.goodness)
    wanted += [(best, one) for one in approaches if one is not best]
    pairs = compare_pairs(wanted)
    by_names = {(pair.first, pair.second): pair for pair in pairs}

    def pair_of(a: Approach | None, b: Approach | None) -> Pair | None:
        return by_names.get((a.name, b.name)) if a and b else None

    training, lookup = pair_of(tuned, plain), pair_of(looking, plain)
    on_top = pair_of(both, tuned)
    finding = _finding(training, lookup, on_top)
    sentences = [
        _FINDINGS[finding],
        *_evidence(training, lookup, on_top, figure, num_rows),
        *_untried(plain, tuned, looking or both),
        *_of_change(approaches, figure),
        _choice(approaches, best, by_names, figure),
    ]
    return Verdict(finding, tuple(sentences), tuple(pairs))


def compare_pairs(wanted: Sequence[tuple[Approach, Approach]]) -> list[Pair]:
    """Every pair once, with Holm's correction over all; on the rows that both were measured on."""
    pairs: dict[tuple[str, str], Pair] = {}
    for a, b in wanted:
        if a.name == b.name or (a.name, b.name) in pairs:
            continue
        found = _on_common_rows(a, b)
        if found is not None:
            pairs[a.name, b.name] = Pair(a.name, b.name, found)
    # A pair and its mirror image are one test.
    tests = {frozenset(key): pair.found.p_value for key, pair in pairs.items()}
    adjusted = dict(zip(tests, holm(list(tests.values())), strict=True))
    return [Pair(pair.first, pair.second, pair.found, adjusted[frozenset(key)]) for key, pair in pairs.items()]


def _on_common_rows(a: Approach, b: Approach) -> Comparison | None:
    import numpy as np

    places = {where: place for place, where in enumerate(b.where)}
    rows = np.array([(mine, places[where]) for mine, where in enumerate(a.where) if where in places], dtype=np.int64).reshape(-1, 2)
    sign = 1.0 if a.figure.higher_is_better else -1.0
    first, second = (
        replace(
            one.figure,
            values=None if one.figure.values is None else sign * one.figure.values[chosen],
            weights=None if one.figure.weights is None else one.figure.weights[chosen],
        )
        for one, chosen in ((a, rows[:, 0]), (b, rows[:, 1]))
    )
    return first.against(second)


def _best(approaches: Sequence[Approach], *, is_trained: bool, looks_up: bool) -> Approach | None:
    """The best of a kind on the same rows: where it is the one that others are compared with, this favours it."""
    kind = [one for one in approaches if one.is_trained == is_trained and one.looks_up == looks_up]
    return max(kind, key=lambda one: one.goodness, default=None)


def _finding(training: Pair | None, lookup: Pair | None, on_top: Pair | None) -> Finding:
    if training is None or (lookup is None and on_top is None):
        return "open"
    helps_training = training.gains
    helps_lookup = any(pair is not None and pair.gains for pair in (lookup, on_top))
    if helps_training and helps_lookup:
        return "both"
    if helps_training:
        return "form"
    return "facts" if helps_lookup else "neither"


_FINDINGS: dict[Finding, str] = {
    "form": "What was missing looks like form: training on examples helps, and looking things up is not shown to add to it.",
    "facts": "What was missing looks like facts: passages in the prompt help, and training is not shown to.",
    "both": "Both were missing, form and facts: training helps, and so do passages in the prompt.",
    "neither": "Nothing is shown to help: neither training nor passages in the prompt beat asking the base, on these rows.",
    "open": "Whether form or facts were missing is not told: that needs an approach that trains and one that looks things up.",
}


def _evidence(training: Pair | None, lookup: Pair | None, on_top: Pair | None, figure: str, num_rows: int) -> list[str]:
    parts = []
    for what, pair in (("training", training), ("passages in the prompt", lookup), ("passages on top of training", on_top)):
        if pair is None:
            continue
        moved = pair.found.difference
        shown = "" if pair.is_shown else f", which is not shown to be more than chance ({pair.found.detectable_text()})"
        parts.append(
            f"{what} ({pair.first} against {pair.second}) changes {figure} by {moved.value:+.3g} "
            f"({moved.low:+.3g} to {moved.high:+.3g}, p {p_text(pair.adjusted_p)}{shown})"
        )
    return [f"Evidence, {num_rows} rows, 95 % intervals, p after Holm: {'; '.join(parts)}."] if parts else []


def p_text(p_value: float) -> str:
    """
    Example:
        >>> p_text(0.0312), p_text(1e-9)
        ('0.031', '< 0.0001')
    """
    return f"{p_value:.2g}" if p_value >= 1e-4 else "< 0.0001"


def _untried(plain: Approach | None, tuned: Approach | None, looking: Approach | None) -> list[str]:
    missing = [what for what, one in (("plain prompting", plain), ("fine-tuning", tuned), ("retrieval", looking)) if one is None]
    return [f"Not tried: {' and '.join(missing)}."] if missing else []


def _of_change(approaches: Sequence[Approach], figure: str) -> list[str]:
    """Who still answers rightly once the facts are others."""
    told = [one for one in approaches if one.changed is not None]
    if not told:
        if any(one.is_trained for one in approaches):
            return ["Whether training taught facts that will go out of date is not measured: that needs rows from after a change."]
        return []
    parts = [f"{one.name} {one.figure.interval.value:.3g} -> {one.changed.value:.3g}" for one in told if one.changed is not None]
    return [f"After the facts changed, without training again, {figure}: {'; '.join(parts)}."]


def _choice(approaches: Sequence[Approach], best: Approach, pairs: Mapping[tuple[str, str], Pair], figure: str) -> str:
    """The best, and the cheapest that is not shown to be worse."""
    equals = [one for one in approaches if one is best or not _is_beaten(pairs.get((best.name, one.name)))]
    cheapest = min(equals, key=lambda one: (one.is_trained, one.cost))
    value = f"{figure} {best.figure.interval.value:.3g} ({best.figure.interval.low:.3g} to {best.figure.interval.high:.3g})"
    if cheapest is best:
        rivals = [one.name for one in equals if one is not best]
        beside = f"; {', '.join(rivals)} cannot be told from it on these rows" if rivals else ", and it is shown to beat every other"
        return f"Best measured: {best.name}, {value}{beside}."
    return f"Best measured: {best.name}, {value}; {cheapest.name} costs less and is not shown to be worse."


def _is_beaten(pair: Pair | None) -> bool:
    return pair is not None and pair.gains
