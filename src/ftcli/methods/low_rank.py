"""What LoRA and QLoRA share: low-rank matrices added to the linear layers of a frozen base, through PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from ftcli.errors import Problem, RequestError
from ftcli.methods.method import MethodSettings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext

Variant = Literal["plain", "rslora", "dora"]
_EVA_BATCHES = 8
_RANK_HINT = "give it a smaller rank by method.rank_pattern"
InitialWeights = Literal["default", "pissa", "olora", "loftq", "eva"]


class LowRank(MethodSettings):
    """Low-rank matrices B (out, rank) and A (rank, in) added to linear weights: W + scaling * B @ A."""

    rank: int = Field(default=16, ge=1)
    """Columns of B and rows of A; a larger value can learn more and costs memory."""
    alpha: float | None = Field(default=None, gt=0)
    """Scaling is alpha / rank, or alpha / sqrt(rank) for rslora. The default is 2 * rank (8 for rslora: the same scaling at rank 16)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero during training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers get an adapter: ends of module names (`q_proj`, `mlp.*`, `layers.[01].*`), or all but the output head."""
    rank_pattern: dict[str, int] = {}
    """Other ranks for some layers, by ends of module names; the first that matches counts."""
    variant: Variant = "plain"
    """`rslora` scales by 1 / sqrt(rank); `dora` also learns the length of every row of the weight."""
    init: InitialWeights = "default"
    """Where A and B start: `pissa` and `olora` from the weight itself, `eva` from the data, `loftq` from the quantisation error."""
    extra_trained_modules: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter: `embed_tokens`, `lm_head`, norms."""
    lora_plus_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of B over that of A; LoRA+ recommends 16."""

    default_lr: ClassVar[float] = 2e-4
    artefact: ClassVar[Literal["model", "adapter"]] = "adapter"

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """`model` with factors beside its frozen weights; what it computes is unchanged (but for `loftq`, which corrects it).

        Raises:
            RequestError: a pattern matches nothing, or a rank is larger than a matrix.
        """
        import torch

        from ftcli.models.quiet import quiet_libraries

        with quiet_libraries():
            from peft import get_peft_model

            from ftcli.methods.adapter import settle_magnitudes, settle_trained_copies
            from ftcli.methods.joint_linear import join_products

            config, ranks = self._peft_config(model)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.seed)
                module = get_peft_model(model, config, autocast_adapter_dtype=True)
                settle_magnitudes(module)
                settle_trained_copies(module)
                if self.init != "default":
                    self._set_initial_factors(module, ranks, context)
            join_products(module)
        return cast("nn.Module", module)

    def parameter_groups(self, module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for a torch optimizer: matrices with weight decay, vectors without; B with its own learning rate."""
        from ftcli.methods.parameter_groups import parameter_groups

        ratio = self.lora_plus_ratio
        return parameter_groups(module, lr, weight_decay, lambda name: ratio if ".lora_B." in name else 1.0)

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the adapter as PEFT reads it; it fits the original base whatever the initialisation was."""
        from ftcli.methods.adapter import save_adapter

        save_adapter(module, folder)

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """The saved adapter on a fresh `base`."""
        from ftcli.methods.adapter import load_adapter

        return load_adapter(base, folder, "LORA")

    def merge(self, module: nn.Module) -> PreTrainedModel:
        """The base with the adapter folded into plain weights; a quantised base becomes its dequantised self."""
        from ftcli.methods.adapter import merge_adapter

        return merge_adapter(module)

    def alpha_of(self, rank: int) -> float:
        """The numerator of the scaling for a matrix of this rank.

        Source: alpha = 2 * rank as Biderman et al. 2024, arXiv:2405.09673, section 4, found best; rslora: Kalajdzievski 2023,
        arXiv:2312.03732, with a constant alpha that gives the same scaling at rank 16.
        """
        if self.alpha is not None:
            return self.alpha
        return 8.0 if self.variant == "rslora" else 2.0 * rank

    def _peft_config(self, model: PreTrainedModel) -> tuple[Any, dict[str, int]]:
        """PEFT's configuration, and the rank of every target by name."""
        from peft import LoraConfig
        from transformers.pytorch_utils import Conv1D

        from ftcli.methods.targets import extra_names, rank_of_each, shortest_suffixes, target_names
        from ftcli.models.classifier import head_names, task_type

        extra = [*extra_names(model, self.extra_trained_modules), *head_names(model)]
        targets = target_names(model, self.target_modules, extra)
        ranks = rank_of_each(targets, self.rank, self.rank_pattern)
        others = {name: rank for name, rank in ranks.items() if rank != self.rank}
        config = LoraConfig(
            task_type=task_type(model),
            r=self.rank,
            lora_alpha=self.alpha_of(self.rank),  # type: ignore[arg-type]  # PEFT divides it, a float is as good
            lora_dropout=self.dropout,
            target_modules=shortest_suffixes(targets, model),
            rank_pattern=others,
            alpha_pattern={name: self.alpha_of(rank) for name, rank in others.items()},
            use_rslora=self.variant == "rslora",
            use_dora=self.variant == "dora",
            modules_to_save=extra or None,
            fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
        )
        return config, ranks

    def _set_initial_factors(self, module: nn.Module, ranks: dict[str, int], context: AttachContext) -> None:
        from ftcli.methods import factors
        from ftcli.methods.adapter import base_weight, lora_layers, set_factors

        model = module.get_base_model()  # type: ignore[operator]
        layers = dict(lora_layers(model))
        self._check_ranks(layers, ranks)
        if context.restoring and self.init in ("eva", "loftq"):
            return
        directions = self._input_directions(model, layers, ranks, context) if self.init == "eva" else {}
        originals = self._original_weights(layers, context) if self.init == "loftq" else {}
        for name, layer in layers.items():
            rank, scaling = ranks[name], layer.scaling["default"]
            if self.init == "eva":
                start = factors.eva_factors(directions[name], layer.out_features, rank)
            elif self.init == "loftq":
                start = factors.loftq_factors(originals[name], base_weight(layer), rank, scaling)
            else:
                make = factors.pissa_factors if self.init == "pissa" else factors.olora_factors
                start = make(base_weight(layer), rank, scaling)
            set_factors(layer, start, keep_initial=self.init in ("pissa", "olora"))

    def _check_ranks(self, layers: dict[str, Any], ranks: dict[str, int]) -> None:
        """A start that is taken from a matrix has no more directions than the matrix."""
        problems = [
            Problem("method.rank", f"{ranks[name]} is more than `{name}` has: {layer.out_features} x {layer.in_features}", _RANK_HINT)
            for name, layer in layers.items()
            if ranks[name] > min(layer.out_features, layer.in_features)
        ]
        if problems:
            raise RequestError(f"init `{self.init}` does not fit the model", problems[:5])

    def _input_directions(
        self, model: nn.Module, layers: dict[str, Any], ranks: dict[str, int], context: AttachContext
    ) -> dict[str, Tensor]:
        from ftcli.methods.factors import input_directions

        if context.sample_batches is None:
            raise RequestError("init `eva` needs training data", [Problem("method.init", "`eva` without data")])
        directions = input_directions(model, layers, ranks, context.sample_batches(_EVA_BATCHES))
        for name, found in directions.items():
            if len(found) < ranks[name]:
                what = f"`eva` needs at least {ranks[name]} tokens of training data, found {len(found)}"
                raise RequestError("init `eva` needs more training data", [Problem("method.init", what, "use init: default")])
        return directions

    def _original_weights(self, layers: dict[str, Any], context: AttachContext) -> dict[str, Tensor]:
        """(out, in) weights before quantisation, by layer."""
        from ftcli.methods.adapter import plain_weight

        if context.original_base is None:
            raise RequestError("init `loftq` needs the base before quantisation", [Problem("method.init", "`loftq` without a base")])
        original = context.original_base()
        return {name: plain_weight(original.get_submodule(name)).to(layer.get_base_layer().weight.device) for name, layer in layers.items()}
