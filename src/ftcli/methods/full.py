"""Full fine-tuning: every weight of the model moves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ftcli.methods.method import MethodSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext


class Full(MethodSettings):
    """Every weight of the model moves; the result is a whole model."""

    kind: Literal["full"] = "full"

    default_lr: ClassVar[float] = 2e-5
    artefact: ClassVar[Literal["model", "adapter"]] = "model"

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """The model itself, every parameter trainable."""
        model.requires_grad_(True)
        return model

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the weights and the configuration; tokenizer files are `models.load.save_model`'s to add."""
        from ftcli.models.load import save_weights

        save_weights(module, folder)

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """A fresh model from `folder`; of `base` only attention, device and dtype are taken."""
        from ftcli.models.load import load_weights

        return load_weights(folder, like=base)

    def merge(self, module: nn.Module) -> PreTrainedModel:
        """The model itself."""
        from ftcli.models.load import as_pretrained

        return as_pretrained(module)
