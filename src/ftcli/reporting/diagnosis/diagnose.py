"""A run's diagnosis: every rule asked in turn, the most telling finding first.

A rule is a function from `Facts` to a verdict and one line in `RULES`. A finding that explains others comes first and silences them:
of a run whose loss exploded nobody need say that it also forgot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftcli.reporting.diagnosis.data import leakage, prompts_trained, template_mismatch, truncation
from ftcli.reporting.diagnosis.facts import Facts
from ftcli.reporting.diagnosis.finding import Finding, Unjudged, Verdict
from ftcli.reporting.diagnosis.fit import overfitting, too_few_steps, underfitting
from ftcli.reporting.diagnosis.memory import forgetting
from ftcli.reporting.diagnosis.rate import dead_adapter, rate_too_high, rate_too_low
from ftcli.reporting.found_run import FoundRun

RULES: dict[str, Callable[[Facts], Verdict]] = {
    "dead adapter": dead_adapter,
    "leakage": leakage,
    "template mismatch": template_mismatch,
    "prompts trained": prompts_trained,
    "length truncation": truncation,
    "rate too high": rate_too_high,
    "rate too low": rate_too_low,
    "overfitting": overfitting,
    "forgetting": forgetting,
    "too few steps": too_few_steps,
    "underfitting": underfitting,
}
EXPLAINS = {
    "dead adapter": ("rate too low", "underfitting", "too few steps"),
    "rate too high": ("overfitting", "underfitting", "too few steps", "forgetting"),
    "rate too low": ("too few steps", "underfitting"),
    "overfitting": ("underfitting", "too few steps"),
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found, what could not be judged, and what was looked at."""

    findings: tuple[Finding, ...]
    unjudged: dict[str, str]
    """Rule -> why it could not say anything."""

    def to_json(self) -> dict[str, Any]:
        return {"findings": [finding.to_json() for finding in self.findings], "unjudged": self.unjudged, "rules": list(RULES)}

    def lines(self) -> list[str]:
        """For people."""
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.name}: {finding.sentence}")
            lines += [f"  {text}" for text in finding.evidence if text]
            lines += [f"  try: {text}" for text in finding.advice]
        if not lines:
            lines.append(f"nothing found: {len(RULES) - len(self.unjudged)} of {len(RULES)} rules looked")
        return lines + [f"not judged: {name} ({why})" for name, why in self.unjudged.items()]


def diagnose(run: FoundRun) -> Diagnosis:
    """What is wrong with a run, as far as its folder tells."""
    facts = Facts(run)
    verdicts = {name: rule(facts) for name, rule in RULES.items()}
    found = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, Finding)}
    silenced = {other for name in found for other in EXPLAINS.get(name, ())}
    return Diagnosis(
        tuple(finding for name, finding in found.items() if name not in silenced),
        {name: verdict.why for name, verdict in verdicts.items() if isinstance(verdict, Unjudged)},
    )
