"""LISA: a few random layers train at a time, embeddings and head always. Source: Pan et al. 2024, arXiv:2403.17919."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftcli.errors import Problem, RequestError
from ftcli.methods.whole_model import WholeModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext


class Lisa(WholeModel):
    """A few decoder layers train at a time, drawn anew every period; embeddings, head and final norm train always.

    Only the layers at work have gradients and optimizer state, so that memory is near LoRA's while every weight may move: a layer
    that goes to rest loses its state, and one that is called up begins with none, as if each period were an AdamW run of its own
    (a layer drawn twice in a row goes on). For whole-model results where optimizer state does not fit.

    The default learning rate gives 1.1e-3 on the embedded model, between two that were tried there (40 steps of 16 orders; loss of
    orders and of retained stories, 6.87 and 0.494 before): 4e-4 gave 0.204 and 0.507, 1.5e-3 gave 0.026 and 0.552.

    Source: Pan et al. 2024, arXiv:2403.17919, algorithm 1; two layers as there.
    """

    kind: Literal["lisa"] = "lisa"
    sampled_layers: int = Field(default=2, ge=1)
    """Decoder layers at work at a time; a larger value learns faster and needs more memory."""
    period_steps: int = Field(default=20, ge=1)
    """Steps after which other layers are drawn."""

    default_lr: ClassVar[float] = 5e-5
    rests: ClassVar[bool] = True
    forgets_at_rest: ClassVar[bool] = True

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """The model itself, every parameter trainable until the first step says which rest.

        Raises:
            RequestError: more layers are asked for than there are.
        """
        from ftcli.methods.parts import decoder_layers

        count = len(decoder_layers(model)[1])
        if self.sampled_layers > count:
            what = f"{self.sampled_layers} of a model with {count} decoder layers"
            raise RequestError("the method does not fit the model", [Problem("method.sampled_layers", what, f"at most {count}")])
        model.requires_grad_(True)
        return model

    def before_step(self, module: nn.Module, step: int, num_steps: int, seed: int) -> None:
        """Let all layers rest but those that (seed, period) draws."""
        from ftcli.methods.parameter_groups import rest
        from ftcli.methods.parts import decoder_layers, layer_of
        from ftcli.models.load import as_pretrained

        stack, layers = decoder_layers(as_pretrained(module))
        at_work = self.layers_at_work(step, len(layers), seed)
        for name, parameter in module.named_parameters():
            number = layer_of(name, stack)
            rest(parameter, number is not None and number not in at_work)

    def share_at_work(self, module: nn.Module) -> float:
        """What is outside the layers, and the largest layers."""
        from ftcli.methods.parts import decoder_layers
        from ftcli.models.load import as_pretrained

        layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(as_pretrained(module))[1]]
        total = sum(p.numel() for p in module.parameters())
        return (total - sum(layers) + sum(sorted(layers)[-self.sampled_layers :])) / total

    def layers_at_work(self, step: int, count: int, seed: int) -> frozenset[int]:
        """The layers that train in `step`, of `count`."""
        from ftcli.data.permutation import key_of

        period = (step - 1) // self.period_steps
        return frozenset(sorted(range(count), key=lambda number: key_of(seed, "lisa", period, number))[: self.sampled_layers])

    def what_trains(self, module: nn.Module) -> str | None:
        """The rule: which layers it is changes with the period."""
        return f"{self.sampled_layers} random layers at a time, drawn anew every {self.period_steps} steps; all outside the layers always"
