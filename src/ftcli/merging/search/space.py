"""Searching the parameters of a merge: the box of what may vary, its corners that are the models themselves, and the walk in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ftcli.merging.methods.method import REQUIRED, MergeMethod
from ftcli.merging.search.cma import CmaEs, Vector
from ftcli.merging.search.log import Candidate, Evaluation, EvaluationLog

_DIGITS = 6
"""Of a candidate's numbers: the same on machines whose last bits differ, so that a log of one serves the other."""
FIRST_STEP = 0.25


@dataclass(frozen=True)
class Space:
    """What a search may vary."""

    method: MergeMethod
    num_models: int
    ranges: Mapping[str, tuple[float, float]]
    """Lowest and highest value of each parameter that varies; one for each model where the method has it so."""
    fixed: Mapping[str, Any]
    num_groups: int = 1
    """Of layers, from the first to the last, each with weights of its own."""

    @property
    def variables(self) -> list[tuple[str, int | None, int | None]]:
        """(parameter, model, group of layers) of each dimension; None where it is the same for all."""
        found: list[tuple[str, int | None, int | None]] = []
        for name in self.ranges:
            parameter = self.method.parameter(name)
            models: Sequence[int | None] = range(self.num_models) if parameter is not None and parameter.per_model else (None,)
            groups: Sequence[int | None] = range(self.num_groups) if name == "weight" and self.num_groups > 1 else (None,)
            found += [(name, model, group) for group in groups for model in models]
        return found

    def candidate(self, point: Vector) -> dict[str, Any]:
        """The parameters at a point of the unit box; of grouped weights a list for each group."""
        result: dict[str, Any] = dict(self.fixed)
        for (name, model, group), share in zip(self.variables, point.tolist(), strict=True):
            low, high = self.ranges[name]
            value = round(low + (high - low) * share, _DIGITS)
            if model is None:
                result[name] = value
            elif group is None:
                result.setdefault(name, []).append(value)
            else:
                groups = result.setdefault(name, [[] for _ in range(self.num_groups)])
                groups[group].append(value)
        return result

    def is_fine(self, candidate: Candidate) -> bool:
        """Can these parameters be merged by?"""
        return all(self.method.fault(settings) is None for settings in self.each_group(candidate))

    def each_group(self, candidate: Candidate) -> Iterator[dict[str, Any]]:
        """The settings of each group of layers."""
        for group in range(self.num_groups):
            yield settings_of(self.method, candidate, self.num_models, group)

    def models(self) -> list[dict[str, Any]]:
        """The candidates that are the models themselves."""
        return [{"model": index} for index in range(self.num_models)]

    def middle(self) -> Vector:
        """The point where all models count the same: 1 / n where the range has it."""
        point = np.full(len(self.variables), 0.5)
        for index, (name, _, _) in enumerate(self.variables):
            low, high = self.ranges[name]
            if name == "weight" and low <= 1 / self.num_models <= high and high > low:
                point[index] = (1 / self.num_models - low) / (high - low)
        return point


def settings_of(method: MergeMethod, candidate: Candidate, num_models: int, group: int = 0) -> dict[str, Any]:
    """Every parameter of a method as its function wants it.

    Args:
        candidate: values by name; a parameter that each model has its own of may be one number or one for each.
    """
    found: dict[str, Any] = {}
    for parameter in method.parameters:
        value = parameter.taken(candidate.get(parameter.name, parameter.default))
        if value is REQUIRED:
            value = 1.0
        if parameter.per_model:
            if isinstance(value, list) and value and isinstance(value[0], list):
                value = value[group]
            value = tuple(value) if isinstance(value, list | tuple) else (value,) * num_models
        found[parameter.name] = value
    return found


def search(
    space: Space, evaluate: EvaluationLog, *, algorithm: Literal["cma-es", "random"], budget: int, seed: int
) -> Evaluation:  # fmt: skip
    """The best of at most `budget` evaluations: the models themselves, their even mixture, then what the algorithm asks for.

    So it is never worse than the best model. The same seed asks for the same points.
    """
    for candidate in space.models()[:budget]:
        evaluate(candidate)
    middle = space.candidate(space.middle())
    if len(evaluate.evaluations) < budget and space.is_fine(middle):
        evaluate(middle)
    if not space.variables:
        return evaluate.best()
    if algorithm == "random":
        _random(space, evaluate, budget, seed)
    else:
        _cma_es(space, evaluate, budget, seed)
    return evaluate.best()


def _random(space: Space, evaluate: EvaluationLog, budget: int, seed: int) -> None:
    """Points drawn evenly from the box."""
    random = np.random.default_rng(seed)
    for _ in range(100 * budget):
        if len(evaluate.evaluations) >= budget:
            return
        candidate = space.candidate(random.random(len(space.variables)))
        if space.is_fine(candidate):
            evaluate(candidate)


def _cma_es(space: Space, evaluate: EvaluationLog, budget: int, seed: int) -> None:
    walk = CmaEs(space.middle().tolist(), FIRST_STEP, seed)
    for _ in range(100 * budget):
        points, values = walk.ask(), []
        for point in points:
            candidate = space.candidate(point)
            if not space.is_fine(candidate):
                values.append(float("-inf"))
                continue
            if len(evaluate.evaluations) >= budget:
                return
            values.append(evaluate(candidate).value)
        walk.tell(points, values)
