"""AdaLoRA's bookkeeping: how much each singular value matters, how many may stay in this step, and which.

Source: Zhang et al. 2023, arXiv:2303.10512, sections 3.2 and 3.3. Legend: ``R`` initial rank, ``I`` and ``O`` inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel

ADAPTER = "default"
FACTORS = ("lora_A", "lora_E", "lora_B")
SMOOTHING = 0.85  # of sensitivity and uncertainty, as the paper has it


@dataclass
class RankBudget:
    """What is known of the factors of one layer after some steps."""

    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    """Running mean of |weight * gradient| of each number, by factor."""
    uncertainty: dict[str, Tensor] = field(default_factory=dict)
    """Running mean of its distance from that mean."""
    kept: Tensor | None = None
    """(R,) bool: the singular values that the last budget left."""


def adalora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer with AdaLoRA's factors, by name."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, AdaLoraLayer))


def _budget(layer: Any) -> RankBudget:
    if not hasattr(layer, "rank_budget"):
        layer.rank_budget = RankBudget()
    found: RankBudget = layer.rank_budget
    return found


def update_importance(module: nn.Module) -> None:
    """Take the gradients of this step into the running means; a factor without one had no part in it."""
    for _, layer in adalora_layers(module):
        budget = _budget(layer)
        for name in FACTORS:
            weight = getattr(layer, name)[ADAPTER]
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            found = (weight * gradient).abs().detach()
            mean = budget.sensitivity.get(name, torch.zeros_like(found)) * SMOOTHING + (1 - SMOOTHING) * found
            spread = budget.uncertainty.get(name, torch.zeros_like(found)) * SMOOTHING + (1 - SMOOTHING) * (found - mean).abs()
            budget.sensitivity[name], budget.uncertainty[name] = mean, spread


def budget_of(step: int, first: int, last: int, at_start: int, at_end: int) -> int:
    """How many singular values of the whole model may stay after `step`: all, then fewer along a cubic, then the final number.

    Args:
        first: the last step with all of them.
        last: the first step with the final number.

    Example:
        >>> [budget_of(step, 1, 5, 64, 0) for step in (1, 2, 3, 4, 5, 6)]
        [64, 27, 8, 1, 0, 0]

    Source: equation 13.
    """
    if step >= last:
        return at_end
    if step <= first:
        return at_start
    return int(at_end + (at_start - at_end) * (1 - (step - first) / (last - first)) ** 3)


def keep_most_important(module: nn.Module, budget: int, *, is_final: bool) -> None:
    """Set all singular values but the `budget` most important ones to zero.

    Args:
        is_final: the choice has been made and stays.
    """
    layers = [layer for _, layer in adalora_layers(module)]
    if not is_final or any(_budget(layer).kept is None for layer in layers):
        scores = [_scores(_budget(layer)) for layer in layers]
        order = torch.cat(scores).sort(descending=True, stable=True).indices
        is_kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        is_kept[order[:budget]] = True
        for layer, kept in zip(layers, is_kept.split([len(score) for score in scores]), strict=True):
            _budget(layer).kept = kept.clone()
    with torch.no_grad():
        for layer in layers:
            values, kept_values = layer.lora_E[ADAPTER], _budget(layer).kept
            assert kept_values is not None
            values.masked_fill_(~kept_values[:, None], 0.0)


def _scores(budget: RankBudget) -> Tensor:
    """(R,) importance of a singular value with its two vectors: equations 8 and 9."""
    of = {name: budget.sensitivity[name] * budget.uncertainty[name] for name in FACTORS}
    return of["lora_E"][:, 0] + of["lora_A"].mean(dim=1) + of["lora_B"].mean(dim=0)


def budget_state(module: nn.Module) -> dict[str, Tensor]:
    """Everything that moves with the steps, by <part>/<layer>/<factor>."""
    state: dict[str, Tensor] = {}
    for layer_name, layer in adalora_layers(module):
        budget = _budget(layer)
        for part in ("sensitivity", "uncertainty"):
            state |= {f"{part}/{layer_name}/{factor}": tensor for factor, tensor in getattr(budget, part).items()}
        if budget.kept is not None:
            state[f"kept/{layer_name}"] = budget.kept
    return state


def restore_budget_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `budget_state` gave."""
    for layer_name, layer in adalora_layers(module):
        device = layer.lora_E[ADAPTER].device
        budget = layer.rank_budget = RankBudget()
        for part in ("sensitivity", "uncertainty"):
            keys = {factor: f"{part}/{layer_name}/{factor}" for factor in FACTORS}
            getattr(budget, part).update({factor: state[key].to(device) for factor, key in keys.items() if key in state})
        if f"kept/{layer_name}" in state:
            budget.kept = state[f"kept/{layer_name}"].to(device)


def note_ranks(module: Any) -> None:
    """Tell PEFT which singular values are not zero, so that only they are written; read from the values themselves."""
    pattern = {f"{name}.lora_E": (layer.lora_E[ADAPTER] != 0).flatten().tolist() for name, layer in adalora_layers(module.base_model.model)}
    module.peft_config[ADAPTER].rank_pattern = pattern


@dataclass(frozen=True)
class Orthogonality:
    """The mean distance of the singular vectors from orthogonal ones, as a penalty: equation 4."""

    weight: float
    reads_hidden: bool = False

    def loss_sum(self, model: TreeModel, batch: Batch, hidden: Tensor) -> Tensor:
        """The penalty times the batch's weight of targets, so that a step's mean holds it once."""
        distances = []
        for _, layer in adalora_layers(model.module):
            for product in (layer.lora_A[ADAPTER] @ layer.lora_A[ADAPTER].T, layer.lora_B[ADAPTER].T @ layer.lora_B[ADAPTER]):
                distances.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        return self.weight * torch.stack(distances).mean() * batch.total_weight
