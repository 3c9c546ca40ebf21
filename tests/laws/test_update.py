"""Laws 1, 2 and 6: the update does not depend on the cut, and is the gradient of a plain cross-entropy over single examples.

SGD without clipping is the instrument: Adam would hide an error of scale. Everything is float64.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional

from ftcli.data.tree import TokenTree, target_weights
from ftcli.layout.build import ancestor_paths, build_batch, leaf_segments
from ftcli.layout.model import TreeModel
from ftcli.layout.plan import plan_micro_batches
from ftcli.methods.full import Full
from ftcli.objectives.causal_lm import CausalLM
from ftcli.optim.optimizers.sgd import SGD
from ftcli.training.batches import BatchSource
from ftcli.training.step import Learner, optimizer_step
from tests.laws.conftest import branching_tree, make_llama, ragged_trees

LR = 0.5
# Llama's norm computes in float32 even in a float64 model: about 3e-9 where a prefix is shared, while a wrong mean shows at 1e-3.
TOLERANCE = 1e-7


@dataclass
class ListStore:
    """Trees in memory, where a run has a memory-mapped store."""

    trees: list[TokenTree]

    def tree(self, index: int) -> TokenTree:
        return self.trees[index]


@dataclass
class OneStep:
    """An order whose only step sees everything."""

    count: int

    def examples_at(self, step: int) -> list[tuple[int, int]]:
        return [(0, index) for index in range(self.count)]


def updated_parameters(
    trees: list[TokenTree], layout: str, budget: int, checkpointing: bool = False, **changes: object
) -> dict[str, torch.Tensor]:
    """Parameters after one SGD step over `trees`."""
    model = make_llama(**changes)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    accelerator = Accelerator(cpu=True)
    groups = [{"params": list(model.parameters()), "names": [name for name, _ in model.named_parameters()]}]
    prepared, optimizer = accelerator.prepare(TreeModel(model, layout), SGD().build(groups, LR))
    learner = Learner(accelerator, prepared, optimizer, CausalLM(), Full(), 1, None, 17, 1)
    source = BatchSource([ListStore(trees)], OneStep(len(trees)), CausalLM(), layout, budget, 1, 0, 0)
    prepared.train()
    optimizer_step(learner, source.at(1), 1.0)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def reference_parameters(trees: list[TokenTree], **changes: object) -> dict[str, torch.Tensor]:
    """The same step by plain cross-entropy over every branch alone, with the model's own forward pass."""
    model = make_llama(**changes)
    weights = [target_weights(tree, 0.0) for tree in trees]
    total = sum(float(weight.sum()) for weight in weights)
    loss = torch.zeros((), dtype=torch.float64)
    for tree, weight in zip(trees, weights, strict=True):
        bounds, counted = tree.segment_bounds(), set()
        for leaf in leaf_segments(tree):
            path = (*ancestor_paths(tree)[leaf], leaf)
            index = np.concatenate([np.arange(*bounds[segment]) for segment in path])
            own = np.concatenate([np.full(bounds[s][1] - bounds[s][0], 0.0 if s in counted else 1.0) for s in path])
            counted.update(path)
            tokens = torch.from_numpy(tree.tokens[index].astype(np.int64))
            logits = model(input_ids=tokens[None]).logits[0, :-1]
            losses = functional.cross_entropy(logits, tokens[1:], reduction="none")
            loss = loss + (losses * torch.from_numpy((weight[index] * own)[1:].astype(np.float64))).sum()
    (loss / total).backward()
    return {name: (p - LR * p.grad).detach() for name, p in model.named_parameters()}


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("layout", ["forest", "rows"])
@pytest.mark.parametrize("budget", [1, 37, 10_000])
def test_step_is_the_gradient_of_plain_cross_entropy_however_it_is_cut(layout: str, budget: int) -> None:
    trees = [*ragged_trees(), branching_tree()]
    assert largest_difference(updated_parameters(trees, layout, budget), reference_parameters(trees)) < TOLERANCE


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"num_key_value_heads": 4}], ids=["tied head", "plain heads"])
def test_step_is_right_for_tied_heads_and_ungrouped_attention(changes: dict[str, object]) -> None:
    trees = [*ragged_trees(5), branching_tree()]
    assert largest_difference(updated_parameters(trees, "forest", 50, **changes), reference_parameters(trees, **changes)) < TOLERANCE


def test_gradient_checkpointing_changes_nothing() -> None:
    trees = [*ragged_trees(5), branching_tree()]
    with_it = updated_parameters(trees, "forest", 50, checkpointing=True)
    assert largest_difference(with_it, updated_parameters(trees, "forest", 50)) == 0.0


@pytest.mark.parametrize("layout", ["forest", "rows"])
def test_a_branch_gets_what_it_would_get_alone(layout: str) -> None:
    model = TreeModel(make_llama(), layout).eval()
    tree = branching_tree()
    together = build_batch(layout, [*ragged_trees(3), tree], [target_weights(t, 0.0) for t in [*ragged_trees(3), tree]])
    alone = build_batch(layout, [tree], [target_weights(tree, 0.0)])
    with torch.no_grad():
        found = model(together)[together.example == 3]
        assert torch.allclose(found, model(alone), atol=1e-12)


def test_a_token_without_weight_changes_nothing_but_what_follows_it() -> None:
    model = TreeModel(make_llama(), "forest").eval()
    tree = branching_tree()
    weights = target_weights(tree, 0.0)
    changed = tree.tokens.copy()
    changed[20:26] = (changed[20:26] + 1) % 97  # another last branch
    other = TokenTree(changed, tree.starts, tree.parents, tree.spans, tree.num_bytes, tree.row)
    with torch.no_grad():
        first, second = (build_batch("forest", [t], [weights]) for t in (tree, other))
        kept = first.branch != 2
        assert torch.equal(model(first)[kept], model(second)[kept])
        assert not torch.allclose(model(first)[~kept], model(second)[~kept])


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 10, 64, 10_000])
def test_plan_gives_every_example_to_one_micro_batch(num_processes: int, budget: int) -> None:
    lengths = [7, 0, 64, 65, 3, 3, 12, 1, 1, 40]
    plan = plan_micro_batches(lengths, num_processes, budget)
    assert sorted(index for share in plan for part in share for index in part) == list(range(len(lengths)))
    assert all(share for share in plan)
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for share in plan for part in share)


def test_head_with_bias_scale_and_softcap_equals_its_plain_form() -> None:
    from ftcli.models.head import HeadTransform, target_log_probs

    torch.manual_seed(1)
    transform = HeadTransform(scale=0.7, softcap=5.0)
    head = torch.nn.Linear(16, 50).double()
    hidden = torch.randn(33, 16, dtype=torch.float64)
    targets = torch.randint(0, 50, (33,))
    upstream = torch.randn(33)

    def gradients(function, train_head: bool):
        own = copy.deepcopy(head).requires_grad_(train_head)
        states = hidden.clone().requires_grad_(True)
        (function(states, own).float() * upstream).sum().backward()
        return [states.grad, *([own.weight.grad, own.bias.grad] if train_head else [])]

    def plain(states: torch.Tensor, own: torch.nn.Linear) -> torch.Tensor:
        return (5 * torch.tanh(own(states) * 0.7 / 5)).log_softmax(1).gather(1, targets[:, None]).squeeze(1)

    for train_head in (True, False):
        found = gradients(lambda states, own: target_log_probs(states, targets, own, transform), train_head)
        expected = gradients(plain, train_head)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
