"""What a merge method is: a function of one tensor's pieces and of settings, and what a recipe may say to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ftcli.errors import RunError
from ftcli.merging.numbers import LARGEST
from ftcli.merging.pieces import Inputs, PieceFunction, Settings

Kind = Literal["number", "whole", "boolean", "choice"]
REQUIRED = "required"
"""The default of a parameter that has none."""
_AS_GOOD_AS_0 = 1e-9
"""A difference of sums of weights that float32 does not see."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One setting of a method: its name in the recipe, what may stand there, and what holds without it."""

    name: str
    default: Any
    help: str
    kind: Kind = "number"
    per_model: bool = False
    """Each model has its own."""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()

    def taken(self, value: Any) -> Any:
        """What the method gets for a value: mergekit's files have 1.0 and 0 for true and false.

        Example:
            >>> Parameter("normalize", True, "", "boolean").taken(0.0), Parameter("t", 0.5, "").taken(0.0)
            (False, 0.0)
        """
        is_boolean = self.kind == "boolean" or (self.kind == "choice" and True in self.choices)
        return bool(value) if is_boolean and isinstance(value, int | float) and value in (0, 1) else value

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, in words, or None."""
        if self.kind == "choice":
            taken = self.taken(value)
            is_fine = any(taken is choice or (type(taken) is type(choice) and taken == choice) for choice in self.choices)
        elif self.kind == "boolean":
            is_fine = isinstance(self.taken(value), bool)
        else:
            numbers = (int,) if self.kind == "whole" else (int, float)
            is_fine = isinstance(value, numbers) and not isinstance(value, bool) and abs(value) <= LARGEST["F32"]
            is_fine = is_fine and not (self.minimum is not None and value < self.minimum)
            is_fine = is_fine and not (self.maximum is not None and value > self.maximum)
        if is_fine:
            return None
        written = {True: "`true`", False: "`false`"}.get(value, f"`{value}`") if isinstance(value, bool) else f"`{value}`"
        return f"found {written}, allowed: {self.allowed()}"

    def allowed(self) -> str:
        """
        Example:
            >>> Parameter("t", REQUIRED, "", minimum=0, maximum=1).allowed()
            'a number from 0 to 1'
        """
        if self.kind == "choice":
            words = {True: "true", False: "false"}
            return ", ".join(words[choice] if isinstance(choice, bool) else str(choice) for choice in self.choices)
        if self.kind == "boolean":
            return "true or false"
        word = "a whole number" if self.kind == "whole" else "a number"
        if self.minimum is not None and self.maximum is not None:
            return f"{word} from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{word}, at least {self.minimum:g}"
        return word if self.kind == "whole" else f"{word} that is finite in float32"


@dataclass(frozen=True)
class MergeMethod:
    """One line of registration."""

    name: str
    merge: Callable[[Inputs, Settings], PieceFunction]
    help: str
    parameters: tuple[Parameter, ...]
    base: Literal["required", "optional", "ignored"]
    """`ignored`: a base among the models is one of them; else it is what the others are compared with."""
    num_models: tuple[int, int | None] = (1, None)
    """Fewest and most models, not counting the base."""
    keeps_base: bool = True
    """Where no model differs from the base, the result is the base: copied, bit for bit."""
    is_symmetric: bool = True
    """The order of the models means nothing: they are summed in an order of ftcli's own, so that it cannot change a bit."""
    is_random: bool = False
    """It drops changes at random: two tensors with the same numbers come out different."""
    statistics: Literal["elementwise", "inputs"] | None = None
    """What each model's statistics file holds: one number for each weight, or a matrix over each layer's inputs."""
    fault: Callable[[Settings], str | None] = lambda settings: None
    """What is wrong with settings that are each fine, in words."""
    is_mean: Callable[[Settings], bool] = lambda settings: False
    """With these settings models that are equal give that model: where all that count have the same bits, these are the result."""

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


class NoMean(RunError):
    """Models that have no mean of the kind that is asked for, which only their numbers tell."""


def always(settings: Settings) -> bool:
    """A mean whatever the settings."""
    return True


def sums_to_one(settings: Settings) -> bool:
    """Weights that are divided by their sum, or have a sum of 1."""
    is_normalised = settings.get("normalize", settings.get("normalize_weights", True))
    return bool(is_normalised) or abs(sum(settings["weight"]) - 1) < _AS_GOOD_AS_0


def all_zero(settings: Settings) -> str | None:
    """The fault of a sum in which no model counts: a tensor of zeros."""
    weights = settings["weight"]
    if not any(weights):
        return "the weights are all 0: the tensor would be zeros"
    return _vanishing(weights, settings["normalize"]) or weights_cancel(settings)


def _vanishing(weights: Sequence[float], is_normalised: bool) -> str | None:
    """The fault of weights that are used as they are, and are all smaller than any number of float32."""
    if is_normalised or any(np.float32(weight) for weight in weights):
        return None
    return f"the weights {', '.join(map(str, weights))} are 0 in float32: the tensor would be zeros"


def weights_cancel(settings: Settings) -> str | None:
    """The fault of weights that are to be normalised and sum to about 0."""
    weights = settings["weight"]
    size = sum(abs(weight) for weight in weights)
    if settings.get("normalize", True) and abs(sum(weights)) <= 1e-6 * size:
        return f"the weights {', '.join(map(str, weights))} sum to {sum(weights):g}: their mean is not finite"
    return None


def no_positive_weight(settings: Settings) -> str | None:
    """The fault of weights on a sphere that are not all positive or 0."""
    weights = settings["weight"]
    if min(weights) < 0 or sum(weights) <= 0:
        return f"the weights {', '.join(map(str, weights))}: none may be negative, and one must be above 0"
    return _vanishing(weights, settings.get("normalize_weights", True))
