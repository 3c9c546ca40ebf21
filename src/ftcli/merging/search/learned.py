"""Layer-weighted averages learned on data: how much of each model's change each group of layers gets, by gradient.

theta = base + sum over models of c[group, model] * (model - base). The loss of the evaluation sources is made small in c alone: a few
numbers, so that a few hundred rows are enough. Source: Yang et al. 2023, arXiv:2310.02575 (AdaMerging), which minimises the entropy
of unlabelled inputs; with held-out answers there, their loss is the better judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ftcli.merging.search.judge import Measurer, MergedModel
from ftcli.merging.search.log import EvaluationLog

if TYPE_CHECKING:
    from torch import Tensor

    from ftcli.layout.batch import Batch
    from ftcli.objectives.objective import Posed

_CHECKS = 6
"""How often, at least, the coefficients are judged on all rows while they are learned."""


@dataclass(frozen=True)
class Learned:
    """What was learned."""

    coefficients: list[list[float]]
    """For each group of layers one for each model: the best that were judged."""
    losses: list[float]
    """Of each step's batch, on the scale of the judged loss, nats per target."""


def learn_weights(
    merged: MergedModel,
    measurer: Measurer,
    evaluate: EvaluationLog,
    *,
    steps: int,
    lr: float,
    batch_tokens: int,
    seed: int,
    say: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Learned:
    """The coefficients with the best evaluation among those of the way, before which are each model alone and the uniform average.

    So the result is never worse than any of the models, or their average, on these rows.
    """
    import torch

    num_models = len(merged.sources)
    coefficients = torch.full((merged.num_groups, num_models), 1 / num_models, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=lr)
    batches = _batches(measurer, batch_tokens, seed)
    losses: list[float] = []
    for index in range(num_models):
        evaluate({"model": index})
    evaluate({"weight": _rounded(coefficients)})
    for step in range(steps):
        batch, shares = batches[step % len(batches)]
        optimizer.zero_grad()
        loss = _loss(merged, measurer, coefficients, batch.to(torch.device(measurer.device)), shares) * len(batches)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        say(step + 1, steps, "learn weights")
        if (step + 1) % max(1, steps // _CHECKS) == 0 or step + 1 == steps:
            evaluate({"weight": _rounded(coefficients)})
    best = evaluate.best().candidate
    alone = [[float(index == best.get("model")) for index in range(num_models)]] * merged.num_groups
    return Learned([list(group) for group in best.get("weight", alone)], losses)


def _rounded(coefficients: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in group] for group in coefficients.detach().tolist()]


def _loss(merged: MergedModel, measurer: Measurer, coefficients: Tensor, batch: Batch, shares: Tensor) -> Tensor:
    """What a batch adds to the judged loss, with its graph to the coefficients.

    Args:
        shares: ``(E,)`` how much a target of each example counts.
    """
    import torch
    from torch.func import functional_call

    parameters: dict[str, Tensor] = {}
    for name, parameter in merged.module.named_parameters():
        base = torch.from_numpy(merged.array(-1, name)).to(parameter.device)
        row = coefficients[merged.group_of(name)].to(parameter.device)
        deltas = [torch.from_numpy(merged.array(index, name)).to(parameter.device) - base for index in range(len(merged.sources))]
        # a sum over models, so that the graph holds the changes and no products of them
        parameters[f"module.{name}"] = base + torch.einsum("m,m...->...", row, torch.stack(deltas))
    log_probs = functional_call(measurer.model, parameters, (batch,))
    result: Tensor = -(log_probs * batch.weights * shares.to(log_probs.device)[batch.example]).sum()
    return result


def _batches(measurer: Measurer, batch_tokens: int, seed: int) -> Sequence[tuple[Batch, Tensor]]:
    """The rows of all sources that count, shuffled once, in batches of about so many tokens, and how much a target of each counts.

    A source of many tokens counts no more than the judge lets it: over all batches the losses add up to the judged one.
    """
    import torch

    from ftcli.layout.build import build_posed
    from ftcli.objectives.causal_lm import CausalLM

    objective, pad_id = CausalLM(), measurer.tokenizer.pad_id or 0
    total = sum(measurer.weights.values())
    rows: list[tuple[Posed, float, int]] = []
    for store in measurer.stores:
        posed = [objective.pose(store.tree(index), is_measured=True) for index in range(len(store))]
        share = measurer.weights[store.name] / total / sum(each.weight for each in posed)
        rows += [(each, share, int(length)) for each, length in zip(posed, store.lengths, strict=True) if share > 0]
    parts: list[list[int]] = [[]]
    filled = 0
    for position in np.random.default_rng(seed).permutation(len(rows)).tolist():
        if parts[-1] and filled + rows[position][2] > batch_tokens:
            parts.append([])
            filled = 0
        parts[-1].append(position)
        filled += rows[position][2]
    return [
        (build_posed(measurer.model.layout, [rows[i][0] for i in part], pad_id), torch.tensor([rows[i][1] for i in part])) for part in parts
    ]
