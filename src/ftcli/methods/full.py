"""Full fine-tuning: every weight of the model moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ftcli.methods.whole_model import WholeModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext


class Full(WholeModel):
    """Every weight of the model moves; the result is a whole model."""

    kind: Literal["full"] = "full"

    default_lr: ClassVar[float] = 2e-5

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """The model itself, every parameter trainable."""
        model.requires_grad_(True)
        return model
