"""What a recipe may say under `train` and `every`: how far, how fast, on what hardware."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ftcli.optim.optimizers import Optimizer
from ftcli.optim.optimizers.adamw import AdamW
from ftcli.optim.schedules import Schedule
from ftcli.optim.schedules.cosine import Cosine
from ftcli.spec import Spec


class EarlyStopping(Spec):
    """Stops when the evaluation loss has not fallen for a while."""

    patience: int = Field(default=3, ge=1)
    """Evaluations in a row without a new best loss before the run stops."""
    min_improvement: float = Field(default=0.0, ge=0)
    """Nats per target by which a loss must beat the best to count."""


class Train(Spec):
    """How far, how fast, on what hardware."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the examples; fractions are allowed. Without `epochs`, `steps` and `max_tokens` it is 1."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of `epochs`."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on, instead of `epochs`: the run has as many examples as hold so many tokens on average."""
    global_batch_size: int = Field(default=32, ge=1)
    """Examples per optimizer step, over all devices."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Token budget of one forward pass on one device; a smaller value needs less memory and changes no update."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; the default is the method's, scaled to the width of the model."""
    optimizer: Optimizer = AdamW()
    """How gradients become updates."""
    schedule: Schedule = Cosine()
    """The learning rate over the steps, as a factor of `lr`."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Global L2 norm to which gradients are clipped; null for no clipping."""
    seed: int = Field(default=17, ge=0)
    """The run's one seed; order, initial weights and dropout derive theirs from it."""
    layout: Literal["auto", "forest", "rows"] = "auto"
    """How trees become tensors: `auto` takes the flat forest if a probe shows it equals rows, else rows."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass over float32 weights; `auto` is bf16 on hardware made for it, else `no`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile: faster steps after a slow first one."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    early_stopping: EarlyStopping | None = None
    """Stop when the evaluation loss has not fallen for a while."""


class Every(Spec):
    """When the hooks act, in optimizer steps; all act at the last step, too."""

    log: int = Field(default=10, ge=1)
    """Steps between log lines."""
    evaluate: int | None = Field(default=None, ge=1)
    """Steps between evaluations; the default evaluates before the first and after the last step."""
    save: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; the default is a tenth of the run, at least 50 steps."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept; the best one is always kept."""
