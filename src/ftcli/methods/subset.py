"""What the methods share that train some of the model's own weights and leave the others as they are."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from ftcli.methods.parameter_groups import trained_parameters
from ftcli.methods.whole_model import WholeModel

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext


class Subset(WholeModel):
    """Some of the model's own weights move; the result is a whole model."""

    @abstractmethod
    def trained_names(self, model: PreTrainedModel) -> Collection[str]:
        """Names of the parameters that train, at least one.

        Raises:
            RequestError: there are none, or the settings do not fit the model.
        """

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """The model itself, the chosen parameters trainable."""
        chosen = frozenset(self.trained_names(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        return model

    def what_trains(self, module: nn.Module) -> str | None:
        """The parameters that train, by name."""
        from ftcli.methods.parts import in_words

        return in_words([name for name, _ in trained_parameters(module)], [name for name, _ in module.named_parameters()])
