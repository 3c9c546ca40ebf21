"""What bottleneck adapters share, trained as one or as several: where they are, how wide, and where they start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator

from ftcli.methods.bottleneck.reduction import DEFAULT, layers_in
from ftcli.methods.method import MethodSettings

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ftcli.methods.bottleneck.tuner import BottleneckConfig
    from ftcli.methods.context import AttachContext

Preset = Literal["houlsby", "double-sequential", "pfeiffer", "sequential", "parallel"]
Placement = Literal["output", "stream", "parallel"]
NonLinearity = Literal["relu", "gelu", "swish", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "linear"]

_HOUSLBY = {"mh_adapter": True, "placement": "output", "non_linearity": "swish", "reduction_factor": 16.0, "scaling": 1.0}
_PFEIFFER = {"mh_adapter": False, "placement": "stream", "non_linearity": "relu", "reduction_factor": 16.0, "scaling": 1.0}
_PARALLEL = {"mh_adapter": False, "placement": "parallel", "non_linearity": "relu", "reduction_factor": 2.0, "scaling": 4.0}
PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": _HOUSLBY,
    "double-sequential": _HOUSLBY,
    "pfeiffer": _PFEIFFER,
    "sequential": _PFEIFFER,
    "parallel": _PARALLEL,
}
"""The parts of each named adapter; every one of them has an adapter after or beside the feed-forward network.

Source: Houlsby et al. 2019, arXiv:1902.00751, figure 2; Pfeiffer et al. 2020, arXiv:2005.00247, section 3; He et al. 2021,
arXiv:2110.04366, section 4 (a bottleneck of half the width, added with a factor of 4). Widths and non-linearities as AdapterHub's.
"""

MIN_REDUCTION = 0.25
"""Four times the width of the model is wider than any adapter of the literature; less reduction asks for memory by mistake."""


class BottleneckSettings(MethodSettings):
    """Small networks with a narrow middle, added to what attention and feed-forward give to the residual stream of a frozen base."""

    preset: Preset = "houlsby"
    """The adapter of the literature whose parts hold where none is given: `houlsby`, `pfeiffer`, `parallel`, or their other names."""
    mh_adapter: bool | None = None
    """An adapter at every attention; the default is the preset's."""
    output_adapter: bool = True
    """An adapter at every feed-forward network (a mixture of experts counts as one)."""
    placement: Placement | None = None
    """What an adapter reads: the sub-block's `output`, the residual `stream` after it was added, or before it (`parallel`)."""
    reduction_factor: float | dict[str, float] | None = None
    """Model width / bottleneck width: one number, or numbers for layers from 0 on (`{"0-3": 16, default: 32}`); larger is narrower."""
    non_linearity: NonLinearity | None = None
    """Between the two projections; the default is the preset's."""
    init: Literal["zero_up", "bert", "houlsby"] = "zero_up"
    """First weights: `zero_up` starts as the base exactly; `bert` (deviation 0.02) and `houlsby` (0.01, cut) start near it."""
    scaling: float | Literal["learned"] | None = None
    """Factor on what an adapter adds, or `learned`: one trained number an adapter; the default is the preset's."""
    gating: bool = False
    """Also multiply by a trained gate between 0 and 1, one number a token."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of what an adapter adds that is set to zero during training."""
    leave_out: tuple[int, ...] = ()
    """Layers without adapters, counted from 0."""
    norm_before: bool = False
    """A trained layer norm on what an adapter reads."""
    norm_after: bool = False
    """A trained layer norm on what an adapter adds."""

    default_lr: ClassVar[float] = 3e-4
    artefact: ClassVar[Literal["model", "adapter"]] = "adapter"

    @field_validator("scaling")
    @classmethod
    def _does_something(cls, scaling: float | str | None) -> float | str | None:
        if isinstance(scaling, int | float) and not scaling > 0:
            raise ValueError(f"found {scaling}, allowed: a number above 0, or `learned`")
        return scaling

    @field_validator("reduction_factor")
    @classmethod
    def _is_positive(cls, factor: float | dict[str, float] | None) -> float | dict[str, float] | None:
        named = factor if isinstance(factor, dict) else {} if factor is None else {DEFAULT: factor}
        for key, value in named.items():
            if key != DEFAULT and layers_in(key) is None:
                raise ValueError(f"found `{key}`, allowed: a layer (`3`), a range (`0-3`), or `{DEFAULT}`")
            if not value >= MIN_REDUCTION:
                raise ValueError(f"found {value}, allowed: {MIN_REDUCTION} or more (1 is as wide as the model)")
        return factor

    def lr_at(self, width: int) -> float:
        """The default peak learning rate for a model of this hidden size, less where a fixed scaling makes every update larger."""
        scaling = self.part("scaling")
        return super().lr_at(width) / (1.0 if scaling == "learned" else max(1.0, scaling))

    def part(self, name: str) -> Any:
        """The value of a part: what is given, else the preset's."""
        given = getattr(self, name)
        return PRESETS[self.preset][name] if given is None else given

    def attach(self, model: PreTrainedModel, context: AttachContext) -> nn.Module:
        """`model` with adapters in its sub-blocks; with `init: zero_up` what it computes is unchanged.

        Raises:
            RequestError: the model's layers cannot be told apart, or the settings name layers that are not there.
        """
        import torch

        from ftcli.methods.class_head import refuse_class_head
        from ftcli.models.quiet import quiet_libraries

        refuse_class_head(model, self.kind)  # type: ignore[attr-defined]  # each kind declares its own
        with quiet_libraries():
            from peft import get_peft_model

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.seed)
                module = get_peft_model(model, self.peft_config(), autocast_adapter_dtype=True)
        return cast("nn.Module", module)

    def peft_config(self) -> BottleneckConfig:
        """These settings as PEFT stores them."""
        from ftcli.methods.bottleneck.tuner import BottleneckConfig

        return BottleneckConfig(
            task_type="CAUSAL_LM",
            mh_adapter=self.part("mh_adapter"),
            output_adapter=self.output_adapter,
            placement=self.part("placement"),
            reduction_factor=self.part("reduction_factor"),
            non_linearity=self.part("non_linearity"),
            init=self.init,
            scaling=self.part("scaling"),
            gating=self.gating,
            dropout=self.dropout,
            leave_out=sorted(self.layers_without()),
            norm_before=self.norm_before,
            norm_after=self.norm_after,
        )

    @property
    def merges(self) -> bool:
        """A bottleneck has a non-linearity, which no plain weight has."""
        return False

    def layers_without(self) -> set[int]:
        """Layers that get no adapter."""
        return set(self.leave_out)

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write one plain bottleneck adapter in PEFT's layout."""
        from ftcli.methods.bottleneck.files import save_adapter

        save_adapter(module, folder)

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """The saved adapter on a fresh `base`."""
        from ftcli.methods.bottleneck.files import load_adapter

        return load_adapter(base, folder)

    def merge(self, module: nn.Module) -> PreTrainedModel:
        """
        Raises:
            RequestError: always: there are no plain weights that compute the same.
        """
        from ftcli.methods.bottleneck.tuner import cannot_merge

        raise cannot_merge()
