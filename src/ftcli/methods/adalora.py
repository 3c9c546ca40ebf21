"""AdaLoRA: low-rank updates whose ranks are moved to where they matter.

Source: Zhang et al. 2023, arXiv:2303.10512: the importance of equations 8 to 12, the budget of equation 13, the penalty of equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from ftcli.methods.method import MethodSettings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.layout.model import Penalty
    from ftcli.methods.context import AttachContext


class Adalora(MethodSettings):
    """Low-rank updates P diag(E) Q that begin wide, and lose singular values where they matter least until a mean rank is left.

    Costs what LoRA at `initial_rank` costs, and the importance of every number on top. Take it where some layers are known to need
    much more rank than others and the adapter has to be small; at the same size and with a rank to spare LoRA does as well or
    better (GSM8K .37 against .47 in PEFT's own comparison, whose learning rate is LoRA's). The default lr is
    five times LoRA's, because the update is divided by the rank: 2e-2 was best of 4e-3, 2e-2 and 8e-2 on builtin:tiny (width 192).
    """

    kind: Literal["adalora"] = "adalora"
    rank: int = Field(default=8, ge=1)
    """Mean rank of the layers at the end."""
    initial_rank: int = Field(default=12, ge=2)
    """Rank of every layer at the start; a larger value leaves more to choose from and costs memory."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is multiplied by alpha / initial_rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero during training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get an adapter: ends of module names (`q_proj`, `mlp.*`, `layers.[01].*`), or all but the output head."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps before the first rank is taken."""
    final_ratio: float = Field(default=0.3, gt=0, le=1)
    """Share of the steps at the end in which the ranks stay as they are."""
    orthogonality: float = Field(default=0.1, ge=0)
    """Weight of the penalty that keeps P and Q orthogonal, in nats; the paper takes 0.1 to 0.5."""

    default_lr: ClassVar[float] = 1e-3
    artefact: ClassVar[Literal["model", "adapter"]] = "adapter"

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.initial_rank <= self.rank:
            raise ValueError(f"`initial_rank` ({self.initial_rank}) is not above `rank` ({self.rank}): there is nothing to take away")
        if self.warmup_ratio + self.final_ratio > 1:
            raise ValueError(f"`warmup_ratio` ({self.warmup_ratio:g}) and `final_ratio` ({self.final_ratio:g}) are more than the whole run")
        return self

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """`model` with an update of zero beside its frozen linear layers.

        Raises:
            RequestError: a pattern matches nothing.
        """
        import torch
        from transformers.pytorch_utils import Conv1D

        from ftcli.methods.targets import shortest_suffixes, target_names
        from ftcli.models.classifier import head_names, task_type
        from ftcli.models.quiet import quiet_libraries

        head = head_names(model)
        targets = target_names(model, self.target_modules, head)
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            from peft import AdaLoraConfig, get_peft_model

            from ftcli.methods.adapter import settle_trained_copies

            torch.manual_seed(context.seed)
            config = AdaLoraConfig(
                task_type=task_type(model),
                init_r=self.initial_rank,
                target_r=self.rank,
                lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides it, a float is as good
                lora_dropout=self.dropout,
                orth_reg_weight=max(self.orthogonality, 1e-9),  # PEFT wants a number above zero, and its own penalty is not used
                total_step=1,
                target_modules=shortest_suffixes(targets, model),
                modules_to_save=head or None,
                fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
            )
            module = get_peft_model(model, config)
            settle_trained_copies(module)
        return cast("nn.Module", module)

    def parameter_groups(self, module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for a torch optimizer; weight decay on the singular values alone: P and Q are to stay of length one."""
        groups = super().parameter_groups(module, lr, weight_decay)
        if weight_decay == 0:
            return groups
        split = []
        for is_value in (True, False):
            for group in groups:
                chosen = [(p, n) for p, n in zip(group["params"], group["names"], strict=True) if (".lora_E." in n) == is_value]
                if chosen:
                    parameters, names = map(list, zip(*chosen, strict=True))
                    decay = weight_decay if is_value else 0.0
                    split.append({**group, "params": parameters, "names": names, "weight_decay": decay})
        return split

    def penalties(self) -> Sequence[Penalty]:
        """The distance of P and Q from orthogonal matrices."""
        from ftcli.methods.rank_budget import Orthogonality

        return (Orthogonality(self.orthogonality),) if self.orthogonality > 0 else ()

    def after_update(self, module: nn.Module, step: int, num_steps: int) -> None:
        """Bring the importance of every singular value up to date, and set those to zero that the step's budget leaves out."""
        from ftcli.methods.rank_budget import budget_of, keep_most_important, update_importance

        update_importance(module)
        num_layers, first, last = self._span(module, num_steps)
        budget = budget_of(step, first, last, num_layers * self.initial_rank, num_layers * self.rank)
        keep_most_important(module, budget, is_final=step > last)

    def _span(self, module: nn.Module, num_steps: int) -> tuple[int, int, int]:
        """Number of layers, the last step with all ranks, and the first with the final ones."""
        from ftcli.methods.rank_budget import adalora_layers

        num_layers = sum(1 for _ in adalora_layers(module))
        return num_layers, int(num_steps * self.warmup_ratio), max(1, num_steps - int(num_steps * self.final_ratio))

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """The running importance and uncertainty of every factor, and which singular values are left."""
        from ftcli.methods.rank_budget import budget_state

        return budget_state(module)

    def restore(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        from ftcli.methods.rank_budget import restore_budget_state

        restore_budget_state(module, state)

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the adapter as PEFT reads it, without the singular values that are zero."""
        from ftcli.methods.adapter import save_adapter
        from ftcli.methods.rank_budget import note_ranks

        note_ranks(module)
        save_adapter(module, folder)

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """The saved adapter on a fresh `base`."""
        from ftcli.methods.adapter import load_adapter

        return load_adapter(base, folder, "ADALORA")

    def merge(self, module: nn.Module) -> PreTrainedModel:
        """The base with the update folded into plain weights."""
        from ftcli.methods.adapter import merge_adapter

        return merge_adapter(module)
