"""P-tuning: virtual embeddings computed by a small network while they train. Source: Liu et al. 2021, arXiv:2103.10385."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ftcli.methods.prompt import embedding_config
from ftcli.methods.soft_prompt import SoftPrompt, hidden_size

if TYPE_CHECKING:
    from peft import PromptEncoderConfig, PromptLearningConfig, PromptTuningConfig
    from transformers import PreTrainedModel

    from ftcli.methods.context import AttachContext


class PTuning(SoftPrompt):
    """Virtual embeddings that a small network computes while they train; what is saved is a plain prompt.

    It costs what kind `prompt` costs, and the network's memory and time in training. Take it where a prompt trains unsteadily; on
    the embedded orders it is no better: 150 steps of 8 (base 6.85 nats) end at 2.22 with a rate of 5e-3, 2.43 with 2e-3 and 2.56
    with 5e-4, `encoder: lstm` at 2.17 in twice the time, kind `prompt` at 1.78. Hence the default of 4.3e-3 at width 192.

    On bases of a few million parameters it does not beat the untuned base: no order exact and at most 1 % of 20 labels right after
    100 to 240 steps, though the loss falls (6.8 to 2.3 nats on orders; docs/methods.md, three seeds).
    """

    kind: Literal["p_tuning"] = "p_tuning"
    prompt_length: int = Field(default=20, ge=1)
    """Virtual tokens; a larger value can hold more, is slower, and leaves less of the context for the example."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network between the trained numbers and the virtual embeddings: each position by itself, or all in sequence."""
    encoder_size: int | None = Field(default=None, ge=1)
    """Hidden size of the network; the default is that of the model."""
    encoder_layers: int | None = Field(default=None, ge=1)
    """Layers of the `lstm`, 2 by default; the `mlp` always has three."""

    default_lr: ClassVar[float] = 2e-4

    @property
    def num_virtual_tokens(self) -> int:
        return self.prompt_length

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.encoder_layers is not None and self.encoder != "lstm":
            raise ValueError("`encoder_layers` is read with `encoder: lstm` only")
        return self

    def peft_config(self, model: PreTrainedModel) -> PromptEncoderConfig:
        from peft import PromptEncoderConfig

        plain = embedding_config(model, self.prompt_length)
        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=plain.num_virtual_tokens,
            token_dim=plain.token_dim,
            num_transformer_submodules=1,
            num_attention_heads=plain.num_attention_heads,
            num_layers=plain.num_layers,
            encoder_reparameterization_type=self.encoder.upper(),
            encoder_hidden_size=self.encoder_size or hidden_size(model),
            encoder_num_layers=self.encoder_layers or 2,
        )

    def saved_config(self, config: PromptLearningConfig) -> PromptTuningConfig:
        from peft import PromptTuningConfig

        shared = ("task_type", "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
        return PromptTuningConfig(**{name: getattr(config, name) for name in shared})

    def start(self, model: PreTrainedModel, context: AttachContext, config: PromptLearningConfig) -> None:
        """None: the network makes of PEFT's random numbers what it learns to."""
