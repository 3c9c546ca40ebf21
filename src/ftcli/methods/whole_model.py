"""What the methods share whose result is a whole model with plain weights: it is saved, loaded and merged as what it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from ftcli.methods.method import MethodSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class WholeModel(MethodSettings):
    """Weights of the model itself move; the result is a whole model."""

    artefact: ClassVar[Literal["model", "adapter"]] = "model"

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
