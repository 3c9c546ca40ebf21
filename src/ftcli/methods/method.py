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
    from ftcli.methods.feature_head import FeatureSet
    from ftcli.models.quantisation import Quantization

REFERENCE_WIDTH = 4096
MAX_LR_RATIO = 32.0


class MethodSettings(Spec, ABC):
    """Which weights move, and how they fold back."""

    default_lr: ClassVar[float]
    """Peak learning rate where the recipe gives none, for a model of `REFERENCE_WIDTH`."""
    lr_scales_with_width: ClassVar[bool] = True
    """What trains are matrices, whose best rate under Adam goes with 1 / width; vectors and prompts keep theirs."""
    artefact: ClassVar[Literal["model", "adapter"]]
    """What a run leaves: a whole model, or what is added to one."""
    layouts: ClassVar[frozenset[str]] = frozenset({"forest", "rows"})
    """Layouts in which the method computes what it should."""
    reads_features: ClassVar[bool] = False
    """What trains reads one state of each example that the frozen base gives, the same in every epoch: it is computed once."""
    rests: ClassVar[bool] = False
    """Some parameters get no gradient in some steps: `before_step` lets them rest."""
    forgets_at_rest: ClassVar[bool] = False
    """The optimizer drops its state of a parameter when it goes to rest: memory for those at work only."""

    def lr_at(self, width: int) -> float:
        """The default peak learning rate for a model of this hidden size.

        Matrices of width n take a rate proportional to 1 / n (Yang et al. 2022, arXiv:2203.03466, table 3); with the rates that the
        field uses at width 4096 this gives 4.3e-3 for LoRA on the embedded model, where 4e-3 was found best by trying.

        Example:
            >>> from ftcli.methods.full import Full
            >>> [f"{Full().lr_at(width):.1e}" for width in (8192, 4096, 1024, 192, 16)]
            ['1.0e-05', '2.0e-05', '8.0e-05', '4.3e-04', '6.4e-04']
        """
        return self.default_lr * min(REFERENCE_WIDTH / width, MAX_LR_RATIO) if self.lr_scales_with_width else self.default_lr

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that the method puts before every example; the context must have room for them."""
        return 0

    @property
    def merges(self) -> bool:
        """Whether there are plain weights that compute the same; where there are none, `merge` refuses and says why."""
        return True

    @property
    def num_members(self) -> int:
        """How many adapters compute every example side by side, and vote."""
        return 1

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

    def what_trains(self, module: nn.Module) -> str | None:
        """What exactly moves, in one line, where the kind of the method does not say it."""
        return None

    def share_at_work(self, module: nn.Module) -> float:
        """Share of the trained numbers that have a gradient and optimizer state at a time, in 0..1: the most of any step."""
        return 1.0

    def frozen_layers(self, module: nn.Module) -> int:
        """How many of the lowest decoder layers shall be computed once an example and kept on disk; 0 for none."""
        return 0

    def learn_from(self, module: nn.Module, features: FeatureSet) -> None:
        """Take the features of all training data, which a method that `reads_features` gets before the first step."""

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
