"""Norm tuning: only the weights of the normalisation layers move."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal

from ftcli.errors import RequestError
from ftcli.methods.subset import Subset

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Norms(Subset):
    """Only normalisation weights (and their biases) move: the fewest parameters that touch every layer.

    Forward and backward cost what full training costs, without optimizer state worth speaking of. For small shifts of style or
    domain; it learns little that the base does not know.

    The default learning rate lies between two that were tried on the embedded model (40 steps of 16 orders; loss of orders and of
    retained stories, 6.87 and 0.494 before): 1e-2 gave 1.85 and 0.58, 4e-2 gave 0.49 and 1.49. More steps at a lower rate forget less.

    On small bases it does not beat the untuned base in answers (docs/methods.md, three seeds): at most one order of 300 is exact after
    100 steps (loss 6.9 to 0.3), and no label of babyllama-361 right; the embedded model goes from 0 to 3 % of 20 labels.

    Source: Zhao et al. 2023, arXiv:2312.11420.
    """

    kind: Literal["norms"] = "norms"

    default_lr: ClassVar[float] = 2e-2
    lr_scales_with_width: ClassVar[bool] = False

    def trained_names(self, model: PreTrainedModel) -> Collection[str]:
        """The parameters of all normalisation layers."""
        from ftcli.methods.parts import norm_parameters

        if not (names := norm_parameters(model)):
            raise RequestError(f"`{model.config.model_type}` has no normalisation weights", hint="method.kind: bitfit, freeze or lora")
        return names
