"""The diagonal of the Fisher information of the trained weights, measured on examples.

F = E[g²] with g the gradient of one target's log-probability. A backward pass per target would be too many. The gradient of an
example's summed log-probability has, for targets drawn from the model's own predictions, the sum of its targets' F as its expected
square: given what stands before them, the scores of two targets are uncorrelated. So F is the sum of these squares over the
examples, divided by the number of targets. For the data's own tokens (`labels: data`) it is the usual estimate.

Source: Kirkpatrick et al. 2017, arXiv:1612.00796; Kunstner et al. 2019, arXiv:1905.12558, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftcli.data.permutation import key_of
from ftcli.layout.build import build_posed
from ftcli.layout.model import inner_model
from ftcli.models.head import chunk_size
from ftcli.objectives.regularize.teacher import without_dropout

if TYPE_CHECKING:
    from ftcli.data.store import TreeStore
    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel
    from ftcli.objectives.objective import ObjectiveSettings
    from ftcli.objectives.regularize.start import Start

SEED_RANGE = 2**63


def measured_fisher(
    model: TreeModel,
    start: Start,
    stores: Sequence[TreeStore],
    objective: ObjectiveSettings,
    *,
    examples: int,
    draws_labels: bool,
    seed: int,
    pad_id: int,
    tell: Callable[[int], None],
) -> dict[str, Tensor]:
    """F of every trained parameter at its start, bfloat16: half the memory, and the range of float32.

    Args:
        examples: at most so many are read, evenly over all of `stores`.
        draws_labels: take the gradient for tokens that the model draws, instead of the data's.
    """
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter, _ in start.pairs()}
    weight, device = 0.0, next(model.parameters()).device
    with without_dropout(model), start.restored():
        for done, (store, index) in enumerate(_evenly(stores, examples), start=1):
            batch = build_posed(model.layout, [objective.pose(store.tree(index))], pad_id).to(device)
            if len(batch.targets) == 0:
                continue
            if draws_labels:
                batch = replace(batch, targets=drawn_targets(model, batch, key_of(seed, "fisher", store.name, index) % SEED_RANGE))
            add_squares(sums, model, batch, start)
            weight += float(batch.weights.sum())
            tell(done)
    return {name: (total / max(weight, 1.0)).to(torch.bfloat16) for name, total in sums.items()}


def _evenly(stores: Sequence[TreeStore], examples: int) -> Iterator[tuple[TreeStore, int]]:
    """So many examples of all stores, at equal distances."""
    places = [(store, len(store)) for store in stores]
    total = sum(size for _, size in places)
    count = min(examples, total)
    for number in range(count):
        index = number * total // count
        for store, size in places:
            if index < size:
                yield store, index
                break
            index -= size


@torch.no_grad()
def drawn_targets(model: TreeModel, batch: Batch, seed: int) -> Tensor:
    """(M,) a token for each target, drawn from the model's predictions."""
    states = model.hidden_states(batch)[batch.predict_from]
    head = inner_model(model.module).get_output_embeddings()
    generator = torch.Generator(states.device).manual_seed(seed)
    size = chunk_size(int(getattr(head, "out_features", 0)) or 2**15, states)
    parts = [model.transform(head(part)).softmax(-1) for part in states.split(size)]
    return torch.cat([torch.multinomial(part, 1, generator=generator).squeeze(1) for part in parts])


def add_squares(sums: Mapping[str, Tensor], model: TreeModel, batch: Batch, start: Start) -> None:
    """Add the squared gradient of the batch's summed log-probability."""
    pairs = [(name, parameter) for name, parameter, _ in start.pairs()]
    with torch.enable_grad():
        score = (model(batch) * batch.weights).sum()
    gradients = torch.autograd.grad(score, [parameter for _, parameter in pairs], allow_unused=True)
    for (name, _), gradient in zip(pairs, gradients, strict=True):
        if gradient is not None:
            sums[name].add_(gradient.float().square())


def with_earlier(fisher: Mapping[str, Tensor], earlier: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """Online EWC: decay x earlier + measured.

    Source: Schwarz et al. 2018, arXiv:1805.06370, section 2.2.
    """
    return {name: (decay * earlier[name].to(own.device).float() + own.float()).to(own.dtype) for name, own in fisher.items()}
