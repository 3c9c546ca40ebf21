"""What every method is: its settings, and what the run asks of it. A method overrides what it does otherwise.

A method answers three questions: how the base is loaded (`quantization`), what trains (`attach`), and how that becomes plain
weights (`merge`, or a refusal with the reason). What changes from step to step is a pure function of the step, so that a resumed
run does what the uninterrupted one did; what cannot be such a function is kept in checkpoints (`state`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftcli.methods.parameter_groups import parameter_groups
from ftcli.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.layout.model import Penalty
    from ftcli.methods.context import AttachContext
    from ftcli.models.quantisation import Quantization


class MethodSettings(Spec, ABC):
    """Which weights move, and how they fold back."""

    default_lr: ClassVar[float]
    """Peak learning rate where the recipe gives none."""
    artefact: ClassVar[Literal["model", "adapter"]]
    """What a run leaves: a whole model, or what is added to one."""
    layouts: ClassVar[frozenset[str]] = frozenset({"forest", "rows"})
    """Layouts in which the method computes what it should."""
    rests: ClassVar[bool] = False
    """Some parameters get no gradient in some steps: `before_step` lets them rest."""

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that the method puts before every example; the context must have room for them."""
        return 0

    def quantization(self) -> Quantization | None:
        """How the base is loaded; None: with its own weights."""
        return None

    @abstractmethod
    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """The module to train, its trained parameters marked by `requires_grad`.

        Raises:
            RequestError: the settings do not fit the model.
        """

    def parameter_groups(self, module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for a torch optimizer: matrices with weight decay, vectors without."""
        return parameter_groups(module, lr, weight_decay)

    def before_step(self, module: nn.Module, step: int, num_steps: int, seed: int) -> None:
        """Make `module` ready for `step`, counted from 1: a pure function of the step, whatever was before it.

        What holds in training only looks at `module.training`: evaluation happens between steps.
        """

    def after_update(self, module: nn.Module, step: int, num_steps: int) -> None:
        """Act on `module` after the optimizer's update of `step`; the step's gradients are still there."""

    def penalties(self) -> Sequence[Penalty]:
        """What is added to the objective, computed in the same forward pass."""
        return ()

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """What moves with the steps beside the trained parameters, for checkpoints."""
        return {}

    def restore(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""

    @abstractmethod
    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the result as other tools read it."""

    @abstractmethod
    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """What was saved, on a fresh `base`."""

    @abstractmethod
    def merge(self, module: nn.Module) -> PreTrainedModel:
        """Plain weights that compute the same.

        Raises:
            RequestError: there are none, and why.
        """
