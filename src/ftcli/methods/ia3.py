"""IA3: learnt factors on keys, values and the inner activations of the feed-forward layers.

Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from ftcli.errors import Problem, RequestError
from ftcli.methods.method import MethodSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext


class Ia3(MethodSettings):
    """Learnt factors, one for every key, value and inner feed-forward activation; all are one at the start.

    One of the smallest adapters, of kilobytes, and nothing left of it at inference once it is merged. Quality is below LoRA's: GSM8K
    .46 against .47 to .51 in PEFT's own comparison, with factors on all layers and lr 5e-3; .31 with PEFT's defaults, which adapt
    keys, values and inner activations as the paper does. Hence all layers here. Take it where adapters must be tiny or many.
    The default lr is the better run's; in 20 steps of the order task on builtin:tiny (width 192) 8e-2 was best of 4e-3 to 8e-2.
    """

    kind: Literal["ia3"] = "ia3"
    target_modules: Literal["all-linear", "keys-values-inner"] | tuple[str, ...] = "all-linear"
    """Which linear layers get factors: all but the output head, those of the paper, or ends of module names (`k_proj`, `mlp.*`)."""
    feedforward_modules: tuple[str, ...] | None = None
    """Of these, the layers whose inputs are scaled instead of their outputs; the default is every layer that closes a feed-forward."""

    default_lr: ClassVar[float] = 5e-3
    artefact: ClassVar[Literal["model", "adapter"]] = "adapter"

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """`model` with factors of one around its frozen linear layers.

        Raises:
            RequestError: a pattern matches nothing.
        """
        from transformers.pytorch_utils import Conv1D

        from ftcli.models.classifier import head_names, task_type
        from ftcli.models.quiet import quiet_libraries

        with quiet_libraries():
            from peft import IA3Config, get_peft_model

            from ftcli.methods.adapter import settle_trained_copies

            targets, closing = self._targets(model)
            config = IA3Config(
                task_type=task_type(model),
                target_modules=list(targets),
                feedforward_modules=list(closing),
                modules_to_save=head_names(model) or None,
                fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
            )
            module = get_peft_model(model, config)
            settle_trained_copies(module)
        return cast("nn.Module", module)

    def _targets(self, model: PreTrainedModel) -> tuple[Sequence[str], Sequence[str]]:
        """Names of the layers with factors, and of those among them that get them on their inputs."""
        from ftcli.methods.layer_roles import closing_layers, keys_and_values
        from ftcli.methods.targets import target_names
        from ftcli.models.classifier import head_names

        if self.target_modules == "keys-values-inner":
            targets = [*keys_and_values(model), *closing_layers(model)]
        else:
            targets = target_names(model, self.target_modules, head_names(model))
        if self.feedforward_modules is None:
            return targets, [name for name in closing_layers(model) if name in targets]
        chosen = set(target_names(model, self.feedforward_modules)) if self.feedforward_modules else set()
        if strangers := sorted(chosen.difference(targets)):
            what = f"`{strangers[0]}` is none of the target_modules, so that it would get no factors"
            raise RequestError("the method does not fit the model", [Problem("method.feedforward_modules", what, "name it in both")])
        return targets, [name for name in targets if name in chosen]

    def parameter_groups(self, module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for a torch optimizer; no weight decay: it would pull factors of one to zero."""
        return super().parameter_groups(module, lr, 0.0)

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the adapter as PEFT reads it."""
        from ftcli.methods.adapter import save_adapter

        save_adapter(module, folder)

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """The saved adapter on a fresh `base`."""
        from ftcli.methods.adapter import load_adapter

        return load_adapter(base, folder, "IA3")

    def merge(self, module: nn.Module) -> PreTrainedModel:
        """The base with the factors in its weights and biases."""
        from ftcli.methods.adapter import merge_adapter

        return merge_adapter(module)
