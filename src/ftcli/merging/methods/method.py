"""What a merge method is: a function of one tensor's pieces and of settings, and what a recipe may say to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ftcli.errors import RunError
from ftcli.merging.numbers import LARGEST
from ftcli.merging.pieces import Inputs, PieceFunction, Settings

Kind = Literal["number", "whole", "boolean", "choice"]
REQUIRED = "required"
"""The default of a parameter that has none."""


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

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, in words, or None."""
        if self.kind == "choice":
            is_fine = any(value is choice or (type(value) is type(choice) and value == choice) for choice in self.choices)
        elif self.kind == "boolean":
            is_fine = isinstance(value, bool)
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
    statistics: Literal["elementwise", "inputs"] | None = None
    """What each model's statistics file holds: one number for each weight, or a matrix over each layer's inputs."""
    fault: Callable[[Settings], str | None] = lambda settings: None
    """What is wrong with settings that are each fine, in words."""

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


class NoMean(RunError):
    """Models that have no mean of the kind that is asked for, which only their numbers tell."""


def all_zero(settings: Settings) -> str | None:
    """The fault of a sum in which no model counts: a tensor of zeros."""
    if not any(settings["weight"]):
        return "the weights are all 0: the tensor would be zeros"
    return weights_cancel(settings)


def weights_cancel(settings: Settings) -> str | None:
    """The fault of weights that are to be normalised and sum to about 0."""
    weights = settings["weight"]
    size = sum(abs(weight) for weight in weights)
    if settings.get("normalize", True) and abs(sum(weights)) < 1e-6 * max(1.0, size):
        return f"the weights {', '.join(map(str, weights))} sum to {sum(weights):g}: their mean is not finite"
    return None


def no_positive_weight(settings: Settings) -> str | None:
    """The fault of weights on a sphere that are not all positive or 0."""
    weights = settings["weight"]
    if min(weights) < 0 or sum(weights) <= 0:
        return f"the weights {', '.join(map(str, weights))}: none may be negative, and one must be above 0"
    return None
