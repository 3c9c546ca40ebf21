"""AdaMix on tiny real models: routes, what they leave in gradients, the consistency loss by hand, and the collapse to one adapter."""

from __future__ import annotations

import copy
import json
import random
import signal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ftcli.cli.main import run
from ftcli.data.tree import SPAN, TokenTree, path_tree, target_weights
from ftcli.errors import RequestError
from ftcli.layout.build import build_batch
from ftcli.layout.model import TreeModel
from ftcli.methods.adamix import Adamix
from ftcli.methods.bottleneck import mixture as mixture_module
from ftcli.methods.bottleneck.files import adapter_tensors
from ftcli.methods.bottleneck.layer import bottleneck_layers
from ftcli.methods.bottleneck.mixture import Consistency, mixtures, symmetric_kl
from ftcli.methods.bottleneck_adapter import BottleneckAdapter
from ftcli.methods.context import AttachContext
from ftcli.models.head import HeadTransform
from ftcli.models.load import load_model
from ftcli.models.settings import Init, Model
from ftcli.training.hooks import Checkpoint

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
VOCABULARY = 97
IDS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


@cache
def kept_base() -> Any:
    config = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, **LLAMA}
    return load_model(Model(init=Init(architecture="llama", config=config)), None, seed=3).eval()


def attached(method: Adamix | BottleneckAdapter) -> Any:
    return method.attach(copy.deepcopy(kept_base()), AttachContext(seed=5)).eval()


def stirred(module: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module(IDS, use_cache=False).logits
    return found


def one_path(tokens: torch.Tensor) -> TokenTree:
    return path_tree(tokens.numpy().astype(np.int32), np.array([(1, len(tokens), 0.5, False)], dtype=SPAN), 0, 0)


def batch_of_three() -> Any:
    trees = [one_path(row) for row in IDS]
    return build_batch("rows", trees, [target_weights(tree, 1.0) for tree in trees], 0)


@pytest.mark.parametrize("sharing", ["down", "up", "none"])
def test_the_start_is_the_base_in_training_and_in_evaluation(sharing: Any) -> None:
    method = Adamix(sharing=sharing)
    module = attached(method)
    assert torch.equal(logits(module), logits(kept_base()))
    method.before_step(module, 1, 10, 0)
    assert torch.equal(logits(module.train()), logits(kept_base().train()))
    kept_base().eval()


@pytest.mark.parametrize(("sharing", "downs", "ups"), [("down", 1, 3), ("up", 3, 1), ("none", 3, 3)])
def test_experts_share_the_projection_that_is_named(sharing: Any, downs: int, ups: int) -> None:
    module = attached(Adamix(num_experts=3, sharing=sharing, reduction_factor=4.0))
    assert [(len(mixture.downs), len(mixture.ups)) for mixture in mixtures(module)] == [(downs, ups)] * 4
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == 4 * (downs * (32 * 8 + 8) + ups * (8 * 32 + 32))


def test_experts_start_as_one_and_then_part() -> None:
    method = Adamix(num_experts=3)
    module = attached(method)
    first = mixtures(module)[0]
    assert all(torch.equal(first.downs[0].weight, expert.weight) for expert in first.downs)
    train_steps(method, module)
    assert not torch.equal(first.downs[0].weight, first.downs[1].weight)
    assert not torch.equal(first.downs[1].weight, first.downs[2].weight)


def train_steps(method: Adamix | BottleneckAdapter, module: Any, num_steps: int = 4) -> list[float]:
    """What optimizer_step does, by hand: all of it is a function of the step."""
    optimizer = torch.optim.AdamW(method.parameter_groups(module, 0.01, 0.0))
    model, batch, losses = TreeModel(module.train()), batch_of_three(), []
    for step in range(1, num_steps + 1):
        torch.manual_seed(step)
        method.before_step(module, step, num_steps, 7)
        penalties = method.penalties()
        log_probs, penalty = model(batch, penalties) if penalties else (model(batch), torch.zeros(()))
        loss = -(log_probs * batch.weights).sum() + penalty
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    module.eval()
    return losses


def test_one_expert_is_the_plain_adapter_bit_for_bit() -> None:
    plain, mixed = attached(BottleneckAdapter(dropout=0.1)), attached(Adamix(num_experts=1, dropout=0.1))
    assert train_steps(BottleneckAdapter(), plain) == train_steps(Adamix(num_experts=1), mixed)
    assert torch.equal(logits(plain), logits(mixed))
    expected = adapter_tensors(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_tensors(mixed).items())


@pytest.mark.parametrize("sharing", ["down", "up", "none"])
def test_what_is_saved_is_one_plain_adapter_that_computes_what_evaluation_computed(sharing: Any, tmp_path: Path) -> None:
    method = Adamix(sharing=sharing, gating=True, norm_after=True, scaling="learned", init="bert")
    module = attached(method)
    train_steps(method, module)
    method.save(module, tmp_path)
    plain = attached(BottleneckAdapter(gating=True, norm_after=True, scaling="learned"))
    loaded: Any = BottleneckAdapter().load(copy.deepcopy(kept_base()), tmp_path)
    assert torch.equal(logits(loaded), logits(module))
    assert adapter_tensors(loaded).keys() == adapter_tensors(plain).keys()
    assert sum(t.numel() for t in adapter_tensors(loaded).values()) == sum(p.numel() for p in plain.parameters() if p.requires_grad)
    assert mixtures(loaded) == []


def test_with_shared_down_and_a_linear_middle_mean_weights_give_mean_outputs() -> None:
    module = stirred(attached(Adamix(sharing="down", non_linearity="linear")))
    read = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    for mixture in mixtures(module):
        outputs = []
        mixture.train()
        for expert in range(4):
            mixture.pairs = ((0, expert), (0, 0))
            outputs.append(mixture(read))
        torch.testing.assert_close(mixture.eval()(read), torch.stack(outputs).mean(0))


def test_routes_depend_on_seed_and_step_alone_and_differ_between_places() -> None:
    def routes(seed: int, step: int, before: int = 0) -> list[Any]:
        method = Adamix(sharing="none")
        module = attached(method)
        for earlier in range(1, before + 1):
            method.before_step(module, earlier, 10, 99)
        method.before_step(module, step, 10, seed)
        return [mixture.pairs for mixture in mixtures(module)]

    assert routes(1, 3) == routes(1, 3, before=2)
    assert routes(1, 3) != routes(1, 4)
    assert routes(1, 3) != routes(2, 3)
    assert len(set(routes(1, 3))) > 1


def test_every_expert_gets_its_turn_and_those_off_the_routes_rest() -> None:
    method = Adamix()
    module = attached(method)
    mixture = mixtures(module)[0]
    seen = set()
    for step in range(1, 30):
        method.before_step(module, step, 30, 0)
        taken = {down for down, _ in mixture.pairs}
        seen |= taken
        assert [all(p.requires_grad for p in expert.parameters()) for expert in mixture.downs] == [i in taken for i in range(4)]
        assert all(p.requires_grad for p in mixture.ups.parameters())
    assert seen == {0, 1, 2, 3}
    assert sum(len(group["names"]) for group in method.parameter_groups(module, 1e-3, 0.0)) == 4 * (4 + 1) * 2


def test_the_consistency_loss_is_the_symmetric_divergence_of_two_routes() -> None:
    """By hand: both routes through the whole model, softmax over the whole vocabulary, weights 0.5."""
    method = Adamix(sharing="none", consistency=3.0)
    module = stirred(attached(method)).train()
    method.before_step(module, 1, 10, 0)
    model, batch = TreeModel(module), batch_of_three()
    hidden = model.hidden_states(batch)
    (penalty,) = method.penalties()
    found = penalty.loss_sum(model, batch, hidden)
    routes = mixtures(module)[0].routes
    first = module(IDS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    with routes.taken(1):
        second = module(IDS, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    divergence = (first.exp() * (first - second)).sum() + (second.exp() * (second - first)).sum()
    assert float(divergence.detach()) > 0.1
    torch.testing.assert_close(float(found.detach()), 3.0 * 0.5 * 0.5 * float(divergence.detach()), rtol=1e-5, atol=0)
    assert routes.current == 0


def test_equal_routes_cost_nothing_and_few_targets_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    method = Adamix()
    module = stirred(attached(method)).train()
    method.before_step(module, 1, 10, 0)
    model, batch = TreeModel(module), batch_of_three()
    whole = method.penalties()[0].loss_sum(model, batch, model.hidden_states(batch))
    most = 0

    def watched(first: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, len(first))
        return symmetric_kl(first, *rest)

    monkeypatch.setattr(mixture_module, "chunk_size", lambda *_: 4)
    monkeypatch.setattr(mixture_module, "symmetric_kl", watched)
    parts = Consistency(1.0).loss_sum(model, batch, model.hidden_states(batch))
    assert most == 4
    torch.testing.assert_close(parts, whole)
    for mixture in mixtures(module):
        mixture.pairs = (mixture.pairs[0], mixture.pairs[0])
    assert float(Consistency(1.0).loss_sum(model, batch, model.hidden_states(batch)).detach()) == 0


def test_the_divergence_of_two_coins() -> None:
    head = torch.nn.Identity()
    fair, biased = torch.tensor([[0.0, 0.0]]), torch.tensor([[np.log(3.0), 0.0]])
    found = symmetric_kl(fair, biased, torch.tensor([2.0]), head, HeadTransform())
    # p = (1/2, 1/2), q = (3/4, 1/4): half of the sum over both sides of (p - q)(ln p - ln q), times the weight 2
    expected = 0.25 * np.log(0.75 / 0.5) + 0.25 * np.log(0.5 / 0.25)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_recomputed_layers_take_the_route_they_took() -> None:
    gradients = []
    for checkpointing in (False, True):
        method = Adamix(sharing="none")
        module = stirred(attached(method))
        if checkpointing:
            module.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        module.train()
        for step in (1, 2):
            module.zero_grad()
            method.before_step(module, step, 10, 0)
            assert any(mixture.pairs[0] != mixture.pairs[1] for mixture in mixtures(module))
            batch = batch_of_three()
            log_probs, penalty = TreeModel(module)(batch, method.penalties())
            (penalty - (log_probs * batch.weights).sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_training_lowers_the_loss_and_moves_experts_only() -> None:
    method = Adamix(reduction_factor=2.0)
    module = attached(method)
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    losses = train_steps(method, module, 12)
    assert losses[-1] < 0.9 * losses[0]
    found = dict(module.named_parameters())
    assert all(torch.equal(tensor, found[name]) for name, tensor in frozen.items())


def test_no_penalty_where_there_is_nothing_to_agree_on() -> None:
    assert Adamix(num_experts=1).penalties() == ()
    assert Adamix(consistency=0.0).penalties() == ()
    assert len(Adamix().penalties()) == 1


def test_only_one_route_is_drawn_upon_without_the_consistency_loss() -> None:
    method = Adamix(consistency=0.0, sharing="none")
    module = attached(method)
    method.before_step(module, 1, 10, 0)
    for mixture in mixtures(module):
        assert sum(expert.weight.requires_grad for expert in mixture.downs) == 1


def test_merging_is_refused() -> None:
    with pytest.raises(RequestError, match="cannot be merged"):
        Adamix().merge(attached(Adamix()))


def test_a_draw_covers_all_pairs() -> None:
    mixture = mixtures(attached(Adamix(num_experts=2, sharing="none")))[0]
    generator, seen = random.Random(0), set()
    for _ in range(60):
        mixture.draw(generator)
        seen |= set(mixture.pairs)
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert len(list(bottleneck_layers(attached(Adamix())))) == 4


@pytest.mark.parametrize(
    "method",
    [{"kind": "adamix", "dropout": 0.1, "sharing": "none"}, {"kind": "adapter", "dropout": 0.1, "drop": {"kind": "random"}}],
    ids=lambda method: method["kind"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document: dict[str, Any] = {
        "version": 1,
        "model": {"init": {"architecture": "llama", "config": LLAMA}, "tokenizer": "builtin:tiny"},
        "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 9}], "holdout": 0.0, "max_length": 512},
        "method": method,
        "train": {"steps": 8, "global_batch_size": 4, "lr": 0.01, "micro_batch_tokens": 600},
        "every": {"log": 1, "save": 3},
    }
    for name in ("whole", "parts"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**document, "name": name, "output": str(tmp_path / name)}))
    assert run(["train", str(tmp_path / "whole.yaml")]) == 0
    original = Checkpoint.after_step

    def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any) -> None:
        if progress.step == 4:
            self.stop.handle(signal.SIGTERM, None)
        original(self, progress, batches, result)

    monkeypatch.setattr(Checkpoint, "after_step", after_step)
    assert run(["train", str(tmp_path / "parts.yaml")]) == 75
    monkeypatch.setattr(Checkpoint, "after_step", original)
    assert run(["train", str(tmp_path / "parts.yaml"), "--resume"]) == 0
    whole, parts = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
