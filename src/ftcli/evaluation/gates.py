"""Gates: what a model must reach, in one line each, for people and for pipelines.

    orders.exact_match >= 0.9                            a value against a number
    stories.bits_per_byte <= base + 0.02                 against the same figure of the base
    stories.bits_per_byte <= base * 1.01 @ p<0.05        fails only if the rows show the violation at this level

Without `@` a gate judges the values as they are. With it, chance is given the benefit of the doubt: the gate fails if a one-sided
test on the rows (paired with the base's where it is named) says that the bound is crossed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ftcli.errors import Problem, UsageError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_GATE = re.compile(
    rf"\s*(?P<task>[^\s.]+(?:\.[^\s.]+)*?)\.(?P<metric>[^\s.<>=!]+)\s*(?P<relation><=|>=|<|>)\s*"
    rf"(?:(?P<base>base)(?:\s*(?P<sign>[-+*])\s*(?P<margin>{_NUMBER}))?|(?P<number>{_NUMBER}))"
    rf"(?:\s*@\s*p\s*<\s*(?P<level>{_NUMBER}))?\s*"
)
_GRAMMAR = "`TASK.METRIC >= NUMBER`, or `<= base + NUMBER`, with `@ p<0.05` after it where chance shall be allowed for"


@dataclass(frozen=True, slots=True)
class Gate:
    """One bound on one figure."""

    text: str
    task: str
    metric: str
    relation: str
    factor: float
    """Of the base's value: 0 for a bound that is a number alone."""
    margin: float
    level: float | None
    """One-sided p below which a violation counts; None judges the values alone."""

    @property
    def needs_base(self) -> bool:
        return self.factor != 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure of one task."""

    value: float
    values: Values | None = None
    """(n,) one number a row, where the figure is their mean."""
    weights: Values | None = None
    """(n,) how much each row counts in it; the default is the same for all."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """What came of a gate."""

    gate: Gate
    passed: bool
    value: float
    bound: float
    p_value: float | None

    def line(self) -> str:
        """For people."""
        chance = "" if self.p_value is None else f", p of the violation {self.p_value:.3g}"
        return f"{'holds' if self.passed else 'FAILS'}: {self.gate.text} (found {self.value:.4g}, bound {self.bound:.4g}{chance})"

    def to_json(self) -> dict[str, object]:
        return {"gate": self.gate.text, "passed": self.passed, "value": self.value, "bound": self.bound, "p_value": self.p_value}


def parse_gate(text: str) -> Gate:
    """A gate as it is written on the command line.

    Raises:
        UsageError: it is not a gate.

    Example:
        >>> gate = parse_gate("stories.bits_per_byte <= base + 0.02 @ p<0.05")
        >>> gate.task, gate.metric, gate.relation, gate.factor, gate.margin, gate.level
        ('stories', 'bits_per_byte', '<=', 1.0, 0.02, 0.05)
    """
    found = _GATE.fullmatch(text)
    if found is None:
        raise UsageError("a gate cannot be read", [Problem("--gate", f"`{text}`", _GRAMMAR)])
    level = None if found["level"] is None else float(found["level"])
    if level is not None and not 0 < level < 1:
        raise UsageError("a gate cannot be read", [Problem("--gate", f"`{text}`: a level of {level:g} is not between 0 and 1", "p<0.05")])
    factor, margin = 0.0, 0.0
    if found["base"] is None:
        margin = float(found["number"])
    else:
        given = 0.0 if found["margin"] is None else float(found["margin"])
        factor = given if found["sign"] == "*" else 1.0
        margin = {None: 0.0, "+": given, "-": -given, "*": 0.0}[found["sign"]]
    return Gate(text.strip(), found["task"], found["metric"].replace("-", "_"), found["relation"], factor, margin, level)


def judge(gate: Gate, results: Mapping[str, Mapping[str, Measured]], base: Mapping[str, Mapping[str, Measured]] | None) -> GateResult:
    """Whether `gate` holds of `results`, task -> metric -> figure.

    Raises:
        UsageError: there is no such task, metric or base; or a level is asked for of a figure that is no mean over rows.
    """
    found = _figure(gate, results, "was not measured")
    reference = None
    if gate.needs_base:
        if base is None:
            raise UsageError("a gate needs the base", [Problem("--gate", f"`{gate.text}` names the base", "give it by --against")])
        reference = _figure(gate, base, "was not measured of the base")
    bound = gate.margin + (0.0 if reference is None else gate.factor * reference.value)
    if math.isnan(found.value) or math.isnan(bound):
        return GateResult(gate, False, found.value, bound, None)
    holds = {"<=": found.value <= bound, "<": found.value < bound, ">=": found.value >= bound, ">": found.value > bound}[gate.relation]
    if gate.level is None:
        return GateResult(gate, holds, found.value, bound, None)
    p_value = _violation_p(gate, found, reference)
    return GateResult(gate, holds or p_value >= gate.level, found.value, bound, p_value)


def _violation_p(gate: Gate, found: Measured, reference: Measured | None) -> float:
    """One-sided p of the figure being on the wrong side of the bound, of the same weighted mean that is held against it."""
    import numpy as np

    from ftcli.evaluation.statistics import row_differences, sign_flip

    if found.values is None or (reference is not None and reference.values is None):
        what = f"`{gate.text}`: {gate.metric} is no mean over rows, so there is no test of it"
        raise UsageError("a gate cannot be judged", [Problem("--gate", what, "leave `@ p<...` out")])
    if reference is not None and reference.values is not None and len(reference.values) != len(found.values):
        what = f"`{gate.text}`: {len(found.values)} rows were measured, and {len(reference.values)} of the base"
        raise UsageError("a gate cannot be judged", [Problem("--gate", what, "leave `@ p<...` out")])
    bounds = np.zeros_like(found.values) if reference is None or reference.values is None else gate.factor * reference.values
    weights = found.weights if reference is None else reference.weights
    above = row_differences(found.values - gate.margin, bounds, found.weights, weights)
    excess = above if gate.relation.startswith("<") else -above
    two_sided = sign_flip(excess)
    return two_sided / 2 if excess.mean() > 0 else 1 - two_sided / 2


def _figure(gate: Gate, results: Mapping[str, Mapping[str, Measured]], what: str) -> Measured:
    if gate.task not in results:
        hint = did_you_mean(gate.task, list(results)) or f"tasks: {', '.join(results)}"
        raise UsageError("a gate cannot be judged", [Problem("--gate", f"`{gate.text}`: task `{gate.task}` {what}", hint)])
    figures = {name.replace("-", "_"): figure for name, figure in results[gate.task].items()}
    if gate.metric not in figures:
        hint = did_you_mean(gate.metric, list(figures)) or f"figures of {gate.task}: {', '.join(figures)}"
        raise UsageError("a gate cannot be judged", [Problem("--gate", f"`{gate.text}`: `{gate.metric}` {what}", hint)])
    return figures[gate.metric]


def junit_xml(results: Sequence[GateResult], suite: str) -> str:
    """The gates as a JUnit test suite, for the test view of a CI system."""
    failed = sum(not result.passed for result in results)
    root = ElementTree.Element("testsuites", tests=str(len(results)), failures=str(failed))
    part = ElementTree.SubElement(root, "testsuite", name=suite, tests=str(len(results)), failures=str(failed))
    for result in results:
        case = ElementTree.SubElement(part, "testcase", classname=suite, name=result.gate.text)
        if not result.passed:
            ElementTree.SubElement(case, "failure", message=result.line()).text = result.line()
        else:
            ElementTree.SubElement(case, "system-out").text = result.line()
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
