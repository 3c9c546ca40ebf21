"""The numbers of a run that rules look at, read once from its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ftcli.reporting.found_run import FoundRun

MIN_POINTS = 10
"""Fewer logged steps are no curve."""
Points = list[tuple[int, float]]
"""(step, value)."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a run; nothing here raises because of what a file holds."""

    run: FoundRun

    @cached_property
    def losses(self) -> Points:
        """Training loss at each logged step."""
        return points(self.run.metrics.of_kind("train"), "loss")

    @cached_property
    def has_curve(self) -> bool:
        return len(self.losses) >= MIN_POINTS

    @cached_property
    def start(self) -> float:
        """The training loss of the first steps; the first one alone may be of easy rows."""
        return mean([value for _, value in self.losses[: max(1, min(3, len(self.losses) // 8))]])

    @cached_property
    def end(self) -> float:
        return mean(self.part(0.85, 1.0))

    def part(self, first: float, last: float) -> list[float]:
        """Training losses between two shares of the way, at least one."""
        count = len(self.losses)
        begin = min(count - 1, int(first * count))
        return [value for _, value in self.losses[begin : max(begin + 1, round(last * count))]]

    @cached_property
    def roles(self) -> dict[str, str]:
        """Role of each evaluation source."""
        records = self.run.metrics.of_kind("evaluate")
        return {name: str(values.get("role", "target")) for record in records for name, values in record["sources"].items()}

    def evaluations(self, source: str, measure: str = "loss") -> Points:
        """A measure of an evaluation source by step, as it stood last where a step was measured twice."""
        records = self.run.metrics.of_kind("evaluate")
        found = {record["step"]: record["sources"][source].get(measure) for record in records if source in record["sources"]}
        return [(step, float(value)) for step, value in sorted(found.items()) if is_number(value)]

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """The data reports of the training sources."""
        return [report for report in self.run.data if report["use"] == "train"]

    @cached_property
    def repeats(self) -> float | None:
        """How often the examples of the training source that is seen most were seen."""
        value = self.run.manifest.get("repeats")
        numbers = [float(number) for number in value if is_number(number)] if isinstance(value, list) else []
        return max(numbers, default=None)

    @cached_property
    def lr(self) -> float | None:
        return number(self.run.manifest.get("lr"))

    @cached_property
    def lr_ratio(self) -> float | None:
        """The peak learning rate against the method's own default for a model of this width."""
        default = number(self.run.manifest.get("default_lr"))
        return None if self.lr is None or not default else self.lr / default

    @cached_property
    def probe_change(self) -> dict[str, float] | None:
        """How far training has moved the log-probabilities of the probe: `mean` and `largest`, in nats."""
        found = mapping(self.run.manifest.get("probe_change"))
        return (
            {key: float(found[key]) for key in ("mean", "largest")} if all(is_number(found.get(k)) for k in ("mean", "largest")) else None
        )

    @cached_property
    def method(self) -> Mapping[str, Any]:
        return mapping(self.run.recipe.get("method"))

    @cached_property
    def is_text_only(self) -> bool:
        """Every training source is plain text: there is no answer to be right or wrong."""
        return bool(self.sources) and all(source.get("format") == "text" for source in self.sources)

    @cached_property
    def mask_samples(self) -> list[Mapping[str, Any]]:
        value = self.run.manifest.get("mask_samples")
        return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def points(records: Sequence[Mapping[str, Any]], key: str) -> Points:
    """The finite numbers under `key`, by step."""
    return [(record["step"], float(record[key])) for record in records if is_number(record.get(key))]


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and is_number(value) else None


def mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
