"""One optimizer step. Sum over micro-batches and devices, divide once, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftcli.errors import RunError
from ftcli.training.seeds import seed_torch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch import nn

    from ftcli.methods.method import MethodSettings
    from ftcli.objectives import Objective
    from ftcli.objectives.objective import Losses
    from ftcli.objectives.regularize.regularizer import AtWork
    from ftcli.training.batches import StepBatches


@dataclass(frozen=True, slots=True, eq=False)
class Learner:
    """What an update needs. It knows methods and objectives by what they do, and the name of none."""

    accelerator: Accelerator
    model: nn.Module
    """A `TreeModel`, prepared by the accelerator: batch -> what the objective reads."""
    optimizer: AcceleratedOptimizer
    objective: Objective
    method: MethodSettings
    num_steps: int
    max_grad_norm: float | None
    seed: int
    num_sources: int
    regularizers: Sequence[AtWork] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What one step measured, over all devices."""

    loss: float
    """Nats per target, weighted mean over the step."""
    source_sums: Tensor
    """(num_sources, 2) float64 on the CPU: weighted loss sum and sum of weights of each source."""
    grad_norm: float
    """Global L2 norm before clipping."""
    regularizers: dict[str, float] = field(default_factory=dict)
    """What each regularizer adds to the loss, in nats per target; it is not in `loss`."""


def optimizer_step(learner: Learner, batches: StepBatches, lr_factor: float) -> StepResult:
    """One update from the gradient of the weighted mean loss over all of the step's targets, however the step is cut.

    Args:
        batches: the step's micro-batches on this process.
        lr_factor: the schedule's value, a factor on every group's peak learning rate.

    Raises:
        RunError: a loss or gradient is not finite; the weights are as they were before the step.
    """
    accelerator, model, optimizer = learner.accelerator, learner.model, learner.optimizer
    seed_torch(learner.seed, "step", batches.step, accelerator.process_index)
    module = accelerator.unwrap_model(model).module
    learner.method.before_step(module, batches.step, learner.num_steps, learner.seed)
    if learner.method.forgets_at_rest:
        forget_resting(optimizer)
    in_loss = [regularizer for regularizer in learner.regularizers if not regularizer.is_decoupled]
    penalties = [*in_loss, *learner.method.penalties()]
    penalty_sums = torch.zeros(len(penalties), dtype=torch.float64, device=accelerator.device)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_factor
    source_sums = torch.zeros(learner.num_sources, 2, dtype=torch.float64, device=accelerator.device)
    last = len(batches.micro_batches) - 1
    for index, cpu_batch in enumerate(batches.micro_batches):
        batch = cpu_batch.to(accelerator.device)
        with nullcontext() if index == last else accelerator.no_sync(model):
            outputs, added = model(batch, penalties) if penalties else (model(batch), None)
            losses = learner.objective.losses(outputs, batch)
            loss_sum = (losses.values * losses.weights).sum()
            if added is not None:
                loss_sum = loss_sum + added.sum()
                penalty_sums += added.detach()
            # Data-parallel wrappers average gradients over processes; the step's mean is over targets.
            accelerator.backward(loss_sum * (accelerator.num_processes / batches.normaliser))
        add_source_sums(source_sums, losses, batches.sources[index])
    grad_norm = _gradient_norm(learner)
    source_sums = accelerator.reduce(source_sums).cpu()
    loss = float(source_sums[:, 0].sum()) / batches.normaliser
    if not math.isfinite(loss) or (not math.isfinite(grad_norm) and accelerator.mixed_precision != "fp16"):
        optimizer.zero_grad()
        raise NonFiniteError(batches.step, loss, grad_norm)
    held = decoupled_losses(learner)
    optimizer.step()
    learner.method.after_update(module, batches.step, learner.num_steps)
    if not optimizer.step_was_skipped:  # as after an overflow in fp16
        for regularizer in learner.regularizers:
            regularizer.after_update(optimizer)
    optimizer.zero_grad()
    if in_loss:
        means = accelerator.reduce(penalty_sums).cpu() / batches.normaliser
        held |= {regularizer.name: float(mean) for regularizer, mean in zip(in_loss, means[: len(in_loss)], strict=True)}
    return StepResult(loss=loss, source_sums=source_sums, grad_norm=grad_norm, regularizers=held)


def decoupled_losses(learner: Learner) -> dict[str, float]:
    """Of regularizers that act beside the loss, what they would add to it at the weights that the step begins with."""
    found = {regularizer.name: regularizer.decoupled_loss() for regularizer in learner.regularizers}
    return {name: float(value) for name, value in found.items() if value is not None}


def forget_resting(optimizer: AcceleratedOptimizer) -> None:
    """Drop the optimizer's state of every parameter that rests."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if getattr(parameter, "is_resting", False):
                optimizer.state.pop(parameter, None)


class NonFiniteError(RunError):
    """A loss or gradient is NaN or infinite; the update was not made."""

    def __init__(self, step: int, loss: float, grad_norm: float) -> None:
        self.step = step
        super().__init__(f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; the update was not made")


def add_source_sums(sums: Tensor, losses: Losses, sources: list[int]) -> None:
    """Add each weighted loss and its weight to its source's row of `sums`, without waiting for the device."""
    source = torch.tensor(sources, device=sums.device)[losses.example]
    weighted = losses.values.detach() * losses.weights
    sums.index_add_(0, source, torch.stack([weighted, losses.weights], dim=1).to(sums.dtype))


def _gradient_norm(learner: Learner) -> float:
    """Global L2 norm of the gradients, which are clipped to `max_grad_norm` where there is one."""
    limit = math.inf if learner.max_grad_norm is None else learner.max_grad_norm
    norm = learner.accelerator.clip_grad_norm_([p for p in learner.model.parameters() if p.requires_grad], limit)
    return float(norm)
