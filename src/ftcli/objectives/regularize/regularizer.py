"""What every regularizer is: settings that hold training near where it began, and what it may ask a run for.

A regularizer at work is a `Penalty` of the ordinary forward pass (`layout.model`): it is summed over the batch's weighted targets,
so that however a step is cut into micro-batches and processes, its mean holds the penalty once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from ftcli.spec import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel
    from ftcli.objectives.regularize.ewc import EWC
    from ftcli.objectives.regularize.start import Start
    from ftcli.objectives.regularize.teacher import Teacher
    from ftcli.objectives.regularize.teacher_cache import TeacherCache

Role = Literal["new", "replay", "all"]


class AtWork(Protocol):
    """A regularizer of a run."""

    name: str
    """What logs call it."""
    reads_hidden: bool
    """Its loss needs the last hidden states of the batch."""
    is_decoupled: bool
    """It acts after the optimizer's update instead of through the loss."""

    def loss_sum(self, model: TreeModel, batch: Batch, hidden: Tensor) -> Tensor:
        """Nats, summed over the batch's weighted targets."""
        ...

    def decoupled_loss(self) -> Tensor | None:
        """Of what is decoupled, nats per target at the weights as they are, asked for before the update; None of what is in the loss."""
        ...

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Act on the weights, where it is decoupled."""
        ...


@dataclass(frozen=True)
class RegularizeContext:
    """What a regularizer may ask for; nothing is fetched or computed that is not asked for."""

    roles: Sequence[str]
    """Of each training source."""
    start: Callable[[], Start]
    """The trained weights as they were when the run began: one copy for all that ask."""
    head_names: Collection[str]
    """Trained parameters of a fresh classification head."""
    teacher: Callable[[str], Teacher]
    """The model that answers under a name: `base`, `start`, or a reference to another model."""
    cached: Callable[[Teacher, str, Sequence[int], int, float], TeacherCache]
    """(teacher, its name, sources, top k, temperature) -> the answers on disk."""
    fisher: Callable[[EWC], dict[str, Tensor]]
    """The diagonal of the Fisher information at the start, by parameter."""


class RegularizerSettings(Spec, ABC):
    """What holds training near where it began."""

    weight: float = Field(default=1.0, ge=0)
    """Factor on the penalty; a larger value holds more firmly, and 0 costs nothing."""

    @abstractmethod
    def build(self, name: str, context: RegularizeContext) -> AtWork:
        """The regularizer at work.

        Raises:
            RequestError: the settings do not fit the run.
        """


def sources_with(role: Role, roles: Sequence[str]) -> list[int]:
    """Indices of the training sources of a role.

    Example:
        >>> sources_with("replay", ["new", "replay"]), sources_with("all", ["new", "replay"])
        ([1], [0, 1])
    """
    return [index for index, own in enumerate(roles) if role in ("all", own)]
