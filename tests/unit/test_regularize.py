"""Regularizers: closed forms, what the teacher is under each method, and that they leave everything else as it is."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.laws.registered import Bench, described, language_methods, make_bench
from torch import Tensor

from ftcli.cli.main import run
from ftcli.errors import RequestError
from ftcli.layout.build import build_posed
from ftcli.layout.model import TreeModel, inner_model
from ftcli.methods.full import Full
from ftcli.methods.lora import Lora
from ftcli.methods.parameter_groups import trained_parameters
from ftcli.methods.prefix import Prefix
from ftcli.methods.prompt import Prompt
from ftcli.models.load import load_model
from ftcli.models.settings import Model
from ftcli.objectives.causal_lm import CausalLM
from ftcli.objectives.classification import Classification
from ftcli.objectives.regularize.divergence import Divergence
from ftcli.objectives.regularize.ewc import EWC
from ftcli.objectives.regularize.fisher import add_squares, drawn_targets, measured_fisher, with_earlier
from ftcli.objectives.regularize.kl import KL, TopK
from ftcli.objectives.regularize.l2_sp import L2SP
from ftcli.objectives.regularize.pull import DecoupledPull, Pull, Pulled
from ftcli.objectives.regularize.start import Start
from ftcli.objectives.regularize.teacher import AdapterOff, AtStart
from ftcli.objectives.regularize.teacher_cache import SMALLEST_LOG_PROB, TeacherCache, write_answers
from ftcli.optim.optimizers.sgd import SGD
from ftcli.training.assemble import assemble_learner, make_accelerator
from ftcli.training.resources import held_bytes, require_memory
from ftcli.training.step import optimizer_step

EVERYTHING = frozenset({0})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("regularize"), optimizer={"kind": "sgd"}, lr=0.1, max_grad_norm=None)


def holding(bench: Bench, *regularizers: Any) -> Bench:
    return replace(bench, recipe=bench.recipe.model_copy(update={"objective": CausalLM(regularize=regularizers)}))


def moved(module: torch.nn.Module, size: float = 0.05) -> None:
    """Every trained parameter a little off."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in trained_parameters(module):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def first_batch(bench: Bench, layout: str = "forest") -> Any:
    """All eight sentences, as a training batch."""
    from ftcli.layout.batch import Origin

    store = bench.data.prepared.train[0]
    posed = [bench.recipe.objective.pose(store.tree(index)) for index in range(8)]
    return replace(build_posed(layout, posed), origin=Origin(1, tuple((0, index) for index in range(8))))


def divergence(answers: Any, **changes: Any) -> Divergence:
    settings = {"weight": 1.0, "temperature": 1.0, "is_reverse": False, "sources": EVERYTHING, **changes}
    return Divergence("kl", answers=answers, **settings)


def plain_kl(model: TreeModel, batch: Any, theirs: Tensor, temperature: float, is_reverse: bool) -> Tensor:
    """The same from all logits at once."""
    hidden = model.hidden_states(batch)[batch.predict_from]
    ours = (model.transform(inner_model(model.module).get_output_embeddings()(hidden)) / temperature).log_softmax(-1)
    first, second = (ours, theirs) if is_reverse else (theirs, ours)
    return ((first.exp() * (first - second)).sum(-1) * batch.weights).sum() * temperature**2


def all_log_probs(model: TreeModel, batch: Any, temperature: float) -> Tensor:
    with torch.no_grad():
        hidden = model.hidden_states(batch)[batch.predict_from]
        return (model.transform(inner_model(model.module).get_output_embeddings()(hidden)) / temperature).log_softmax(-1)


# ---- kl --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_to_oneself_is_zero_and_has_no_gradient(bench: Bench, direction: str) -> None:
    _, parts = bench.parts(Full())
    penalty = divergence(AtStart(Start.of(parts.module)), is_reverse=direction == "reverse", temperature=2.0)
    _, added = parts.model(first_batch(bench), [penalty])
    gradients = torch.autograd.grad(added.sum(), [p for _, p in trained_parameters(parts.module)])
    assert float(added) == 0.0
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("is_reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=["trained head", "frozen head"])
def test_kl_and_its_gradient_are_those_of_the_whole_logits(
    bench: Bench, method: Any, is_reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftcli.objectives.regularize import divergence as code

    monkeypatch.setattr(code, "chunk_size", lambda *_: 16)
    _, parts = bench.parts(method)
    parts.module.double()
    start = Start.of(parts.module)
    batch = first_batch(bench)
    theirs = all_log_probs(parts.model, batch, 2.0)
    moved(parts.module)
    trained = [p for _, p in trained_parameters(parts.module)]
    _, added = parts.model(batch, [divergence(AtStart(start), is_reverse=is_reverse, temperature=2.0, weight=0.5)])
    expected = 0.5 * plain_kl(parts.model, batch, theirs, 2.0, is_reverse)
    assert float(expected) > 0.1
    torch.testing.assert_close(added.sum(), expected, rtol=1e-9, atol=0)
    for found, wanted in zip(torch.autograd.grad(added.sum(), trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


ADAPTERS = [method() for method in language_methods() if method.artefact == "adapter" and method.__name__ not in ("Peft", "Qlora")]


@pytest.mark.parametrize("method", ADAPTERS, ids=described)
def test_a_model_with_its_adapter_off_is_the_base(bench: Bench, method: Any) -> None:
    _, plain = bench.parts(Full())
    _, parts = bench.parts(method)
    moved(parts.module)
    batch = first_batch(bench)
    flags = {name: p.requires_grad for name, p in parts.module.named_parameters()}
    parts.model.train()
    found = AdapterOff().hidden_states(parts.model, batch)
    with torch.no_grad():
        torch.testing.assert_close(found, plain.model.hidden_states(batch), rtol=0, atol=1e-5)
        assert float((parts.model.eval()(batch) - plain.model(batch)).abs().max()) > 1e-3  # and on again it is not
    assert flags == {name: p.requires_grad for name, p in parts.module.named_parameters()}


def test_the_first_weights_answer_under_autocast_and_dropout_comes_back(bench: Bench) -> None:
    """Autocast keeps a cast of every weight by its identity: the teacher must not find that of the model that trains."""
    _, parts = bench.parts(Full())
    batch = first_batch(bench)
    start = Start.of(parts.module)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before = parts.model.hidden_states(batch)
    moved(parts.module, 0.2)
    parts.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        own = parts.model.hidden_states(batch)
        found = AtStart(start).hidden_states(parts.model, batch)
        again = parts.model.hidden_states(batch)
    assert torch.equal(found, before)
    assert torch.equal(again, own)
    assert not torch.equal(own, before)
    assert all(child.training for child in parts.model.modules())


def test_kl_holds_the_targets_of_its_role_only(bench: Bench) -> None:
    _, parts = bench.parts(Full())
    teacher = AtStart(Start.of(parts.module))
    moved(parts.module)
    batch = first_batch(bench)
    origin = replace(batch.origin, trees=tuple((index % 2, index) for index in range(8)))
    batch = replace(batch, origin=origin)
    parted = [float(parts.model(batch, [divergence(teacher, sources=frozenset({index}))])[1]) for index in (0, 1)]
    whole = float(parts.model(batch, [divergence(teacher, sources=frozenset({0, 1}))])[1])
    assert min(parted) > 0
    assert sum(parted) == pytest.approx(whole, rel=1e-5)
    assert float(parts.model(batch, [divergence(teacher, sources=frozenset({7}))])[1]) == 0.0


# ---- the cache of answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["forest", "rows"])
def test_cached_answers_differ_by_the_divergence_within_the_tail(bench: Bench, layout: str, tmp_path: Path) -> None:
    import numpy as np

    _, parts = bench.parts(Full())
    parts.model.use_layout(layout)
    start, store = Start.of(parts.module), bench.data.prepared.train[0]
    moved(parts.module)
    batch = first_batch(bench, layout)
    settings = {"top_k": 3, "temperature": 2.0, "micro_batch_tokens": 40, "pad_id": 0, "tell": lambda done: None}
    write_answers(tmp_path / "a", AtStart(start), parts.model, store, np.arange(8), bench.recipe.objective, **settings)
    whole = divergence(AtStart(start), temperature=2.0)
    cached = divergence(TeacherCache({0: tmp_path / "a"}), temperature=2.0)
    found, expected = (float(parts.model(batch, [penalty])[1]) for penalty in (cached, whole))

    ours = all_log_probs(parts.model, batch, 2.0).double()
    with start.restored():
        theirs = all_log_probs(parts.model, batch, 2.0).double()
    top = theirs.topk(3, dim=-1).indices
    tails = [values.scatter(1, top, -torch.inf) for values in (ours, theirs)]
    q_tail, p_tail = (tail.log_softmax(-1) for tail in tails)
    within = (p_tail.exp() * (p_tail - q_tail)).nan_to_num(0.0).sum(-1) * tails[1].logsumexp(-1).exp()
    missing = float((within * batch.weights).sum() * 4.0)
    assert missing > 1e-3
    assert found == pytest.approx(expected - missing, rel=1e-4)


def test_cached_answers_of_oneself_pull_nowhere(bench: Bench, tmp_path: Path) -> None:
    import numpy as np

    _, parts = bench.parts(Full())
    store = bench.data.prepared.train[0]
    vocabulary = inner_model(parts.module).config.vocab_size
    for top_k in (1, vocabulary - 1):
        folder = tmp_path / str(top_k)
        settings = {"top_k": top_k, "temperature": 1.0, "micro_batch_tokens": 4096, "pad_id": 0, "tell": lambda done: None}
        teacher = AtStart(Start.of(parts.module))
        write_answers(folder, teacher, parts.model, store, np.arange(8), bench.recipe.objective, **settings)
        _, added = parts.model(first_batch(bench), [divergence(TeacherCache({0: folder}))])
        gradients = torch.autograd.grad(added.sum(), [p for _, p in trained_parameters(parts.module)])
        assert abs(float(added)) < 1e-4
        assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-4
    assert SMALLEST_LOG_PROB < -50


# ---- l2_sp and ewc ---------------------------------------------------------------------------------------------------------


def pulled(start: Start, weight: float, importance: dict[str, Tensor] | None = None) -> list[Pulled]:
    return [Pulled(name, p, value, weight, None if importance is None else importance[name]) for name, p, value in start.pairs()]


def test_the_pull_is_its_closed_form(bench: Bench) -> None:
    _, parts = bench.parts(Full())
    start, batch = Start.of(parts.module), first_batch(bench)
    assert float(parts.model(batch, [Pull("l2_sp", pulled(start, 0.3))])[1]) == 0.0
    moved(parts.module)
    _, added = parts.model(batch, [Pull("l2_sp", pulled(start, 0.3))])
    squares = sum(float((p.detach() - value).square().sum()) for _, p, value in start.pairs())
    assert float(added) / float(batch.total_weight) == pytest.approx(0.15 * squares, rel=1e-5)
    trained = [p for _, p in trained_parameters(parts.module)]
    for gradient, (_, parameter, value) in zip(torch.autograd.grad(added.sum(), trained), start.pairs(), strict=True):
        torch.testing.assert_close(gradient / batch.total_weight, 0.3 * (parameter.detach() - value), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=["full", "lora"])
def test_ewc_with_uniform_fisher_is_l2_sp_bit_for_bit(bench: Bench, method: Any) -> None:
    _, parts = bench.parts(method)
    start, batch = Start.of(parts.module), first_batch(bench)
    moved(parts.module)
    ones = {name: torch.ones_like(p, dtype=torch.bfloat16) for name, p, _ in start.pairs()}
    trained = [p for _, p in trained_parameters(parts.module)]
    found = []
    for importance in (None, ones):
        _, added = parts.model(batch, [Pull("a", pulled(start, 0.3, importance))])
        found.append([added.detach(), *torch.autograd.grad(added.sum(), trained)])
    assert float(found[0][0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_firm_decoupled_pull_leaves_the_weights_at_their_start(bench: Bench) -> None:
    _, parts = bench.parts(Full())
    start = Start.of(parts.module)
    optimizer = torch.optim.SGD([{"params": [p for _, p in trained_parameters(parts.module)], "lr": 0.01}])
    moved(parts.module)
    half = [p.detach().clone().lerp_(value, 0.01 * 50) for _, p, value in start.pairs()]
    DecoupledPull("l2_sp", pulled(start, 50.0)).after_update(optimizer)
    assert all(torch.equal(p, wanted) for (_, p, _), wanted in zip(start.pairs(), half, strict=True))
    DecoupledPull("l2_sp", pulled(start, 1e9)).after_update(optimizer)
    assert all(torch.equal(p, value) for _, p, value in start.pairs())


def test_fisher_of_the_data_is_the_mean_squared_gradient(bench: Bench) -> None:
    _, parts = bench.parts(Lora(rank=4))
    moved(parts.module)
    start, store, objective = Start.of(parts.module), bench.data.prepared.train[0], bench.recipe.objective
    settings = {"examples": 3, "seed": 1, "pad_id": 0, "tell": lambda done: None}
    found = measured_fisher(parts.model, start, [store], objective, draws_labels=False, **settings)
    trained = [p for _, p in trained_parameters(parts.module)]
    expected, weight = [torch.zeros_like(p) for p in trained], 0.0
    for index in (0, 2, 5):  # three of eight, evenly
        batch = build_posed("forest", [objective.pose(store.tree(index))])
        for total, gradient in zip(expected, torch.autograd.grad(parts.model(batch).sum(), trained), strict=True):
            total += gradient.square()
        weight += len(batch.targets)
    for fisher, total in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(fisher.float(), total / weight, rtol=5e-3, atol=1e-12)


def test_fisher_of_the_model_has_its_closed_form_on_a_bias() -> None:
    """A bias before the softmax: F = p (1 - p) a target, summed over the targets of an example and divided by their number."""
    bias = torch.nn.Parameter(torch.tensor([0.5, -0.2, 0.1, 0.0], dtype=torch.float64))
    probabilities = bias.detach().softmax(0)
    generator, sums, targets = torch.Generator().manual_seed(1), torch.zeros(4, dtype=torch.float64), 3

    class Biased(torch.nn.Module):
        def forward(self, drawn: Any) -> Tensor:
            return bias.log_softmax(0)[drawn.targets]

    class Drawn:
        weights = torch.ones(targets)

    start, total = Start({"bias": bias}, {"bias": bias.detach()}), {"bias": sums}
    for _ in range(4000):
        drawn = Drawn()
        drawn.targets = torch.multinomial(probabilities, targets, replacement=True, generator=generator)  # type: ignore[attr-defined]
        add_squares(total, Biased(), drawn, start)  # type: ignore[arg-type]
    torch.testing.assert_close(sums / (4000 * targets), probabilities * (1 - probabilities), rtol=0.06, atol=0)


def test_targets_are_drawn_from_the_models_own_predictions(bench: Bench) -> None:
    _, parts = bench.parts(Full())
    batch = first_batch(bench)
    probabilities = all_log_probs(parts.model, batch, 1.0).exp()
    drawn = torch.stack([drawn_targets(parts.model, batch, seed) for seed in range(60)])
    assert torch.equal(drawn[7], drawn_targets(parts.model, batch, 7))
    likelihood = probabilities.gather(1, drawn.T).mean()
    # E[p(drawn)] is the sum of squared probabilities, which a uniform draw would miss by far
    assert float(likelihood) == pytest.approx(float(probabilities.square().sum(1).mean()), rel=0.1)


def test_an_earlier_fisher_decays() -> None:
    found = with_earlier({"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0])}, 0.5)
    assert found["a"].tolist() == [2.0]


# ---- steps -----------------------------------------------------------------------------------------------------------------

HOLDING = (
    KL(weight=0.5, temperature=2.0),
    KL(weight=0.5, direction="reverse", teacher="start", cache=TopK(top_k=8)),
    L2SP(weight=0.5),
    L2SP(weight=0.5, decoupled=True),
    EWC(weight=2.0, examples=4),
)


def steps(bench: Bench, method: Any, **train: Any) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Trained weights after three steps, and what the regularizers added."""
    bench = bench.with_train(**train)
    recipe, parts = bench.parts(method)
    learner, batches = assemble_learner(recipe, bench.data, parts, make_accelerator(recipe, None))
    learner.model.train()
    results = [optimizer_step(learner, batches.at(step), 1.0) for step in (1, 2, 3)]
    return [p.detach().clone() for _, p in trained_parameters(parts.module)], [result.regularizers for result in results]


def with_replay(bench: Bench) -> Bench:
    """The same rows, said to be of the base's kind."""
    source = bench.recipe.data.train[0].model_copy(update={"role": "replay"})
    return replace(bench, recipe=bench.recipe.model_copy(update={"data": bench.recipe.data.model_copy(update={"train": (source,)})}))


@pytest.mark.parametrize("regularizer", HOLDING, ids=described)
@pytest.mark.parametrize("method", [Full(), Lora(rank=4)], ids=["full", "lora"])
def test_it_is_the_same_update_however_the_step_is_cut_and_holds_back(bench: Bench, method: Any, regularizer: Any) -> None:
    held = holding(with_replay(bench), regularizer)
    whole, added = steps(held, method)
    cut, added_cut = steps(held, method, micro_batch_tokens=20)
    free, nothing = steps(with_replay(bench), method)
    assert all(float((a - b).abs().max()) < 2e-6 for a, b in zip(whole, cut, strict=True))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, free, strict=True)) > 1e-5
    assert [list(item) for item in added] == [[regularizer.kind]] * 3
    assert added[2][regularizer.kind] > 0
    assert added[2][regularizer.kind] == pytest.approx(added_cut[2][regularizer.kind], rel=1e-3, abs=1e-7)
    assert nothing == [{}, {}, {}]


def test_weight_zero_costs_nothing_and_changes_no_bit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = [settings.model_copy(update={"weight": 0.0}) for settings in HOLDING if not getattr(settings, "decoupled", False)]
    for settings in nothing:
        monkeypatch.setattr(type(settings), "build", None)
    found, added = steps(holding(bench, *nothing), Full())
    expected, _ = steps(bench, Full())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert added == [{}, {}, {}]


@pytest.mark.parametrize("method", [Prompt(prompt_length=3), Prefix(prefix_length=3)], ids=lambda method: method.kind)
def test_soft_prompts_can_be_held(bench: Bench, method: Any) -> None:
    _, added = steps(holding(bench, KL(), L2SP()), method)
    assert added[2]["kl"] > 0
    assert added[2]["l2_sp"] > 0


@pytest.mark.parametrize("method", [Prompt(prompt_length=3), Prefix(prefix_length=3), Full()], ids=lambda method: method.kind)
def test_what_a_run_begins_with_costs_nothing_at_the_first_step(bench: Bench, method: Any) -> None:
    _, added = steps(holding(bench, KL(teacher="start"), L2SP(decoupled=True)), method)
    assert added[0] == {"kl": pytest.approx(0.0, abs=1e-9), "l2_sp": 0.0}
    assert added[1]["kl"] > 0
    assert added[1]["l2_sp"] > 0


def test_memory_counts_what_regularizers_hold(bench: Bench) -> None:
    def held(method: Any, *regularizers: Any) -> tuple[int, int]:
        recipe, parts = holding(bench, *regularizers).parts(method)
        return held_bytes(recipe, parts.module), sum(p.numel() for _, p in trained_parameters(parts.module))

    found, numbers = held(Full(), KL(), L2SP(), EWC())
    assert found == (4 + 2) * numbers  # one start for all three, and F in half precision
    assert held(Full(), L2SP(weight=0.0), KL(weight=0.0))[0] == 0
    assert held(Lora(rank=4), KL())[0] == 0
    assert held(Lora(rank=4), KL(teacher="builtin:tiny", cache=TopK(top_k=2)))[0] == 0
    other = sum(p.numel() for p in load_model(Model(base="builtin:tiny"), bench.data.tokenizer).parameters())
    assert held(Lora(rank=4), KL(teacher="builtin:tiny"))[0] == 4 * other


def test_a_run_that_fits_without_its_regularizers_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(8, 8, bias=False)
    monkeypatch.setattr("ftcli.training.resources.device_bytes", lambda device: 64 * 4 * 5)
    require_memory(module, torch.device("cpu"), held=64 * 4)
    with pytest.raises(RequestError, match=r"optimizer and `objective\.regularize`") as caught:
        require_memory(module, torch.device("cpu"), held=64 * 8)
    assert "regularize" in str(caught.value.hint)


def test_optimizers_of_the_bench_are_plain(bench: Bench) -> None:
    assert isinstance(bench.recipe.train.optimizer, SGD)


# ---- recipes ---------------------------------------------------------------------------------------------------------------


def test_a_classifier_takes_what_needs_no_language_model() -> None:
    assert Classification(regularize=(L2SP(),)).regularize[0].kind == "l2_sp"
    with pytest.raises(ValidationError, match="found `kl` in `regularize`, allowed: `l2_sp`"):
        Classification(regularize=(KL(),))
    with pytest.raises(ValidationError, match="found `ewc` 2 times"):
        CausalLM(regularize=(EWC(), EWC()))


def recipe_file(folder: Path, name: str, **changes: Any) -> Path:
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "attention_dropout": 0.1}
    stories = {"source": {"kind": "builtin", "name": "stories"}, "limit": 12, "role": "replay", "weight": 0.5}
    document = {
        "version": 1,
        "name": name,
        "model": {"init": {"architecture": "llama", "config": config}, "tokenizer": "builtin:tiny"},
        "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 10}, stories], "max_length": 128},
        "method": {"kind": "full"},
        "objective": {
            "kind": "causal-lm",
            "regularize": [
                {"kind": "kl", "weight": 0.5, "on": "replay"},
                {"kind": "kl", "on": "new", "cache": {"top_k": 4}},
                {"kind": "l2_sp"},
                {"kind": "ewc", "weight": 10.0, "examples": 3},
            ],
        },
        "train": {"steps": 6, "global_batch_size": 4, "lr": 1e-2},
        "every": {"log": 2, "save": 2},
        "output": str(folder / name),
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("method", [{"kind": "full"}, {"kind": "lora", "rank": 2, "init": "pissa"}], ids=lambda method: method["kind"])
def test_a_resumed_run_is_held_where_the_uninterrupted_one_was(
    tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    from ftcli.training.hooks import Checkpoint

    whole, parts = (recipe_file(tmp_path, name, method=method) for name in ("whole", "parts"))
    assert run(["train", str(whole)]) == 0
    original = Checkpoint.after_step

    def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any) -> None:
        if progress.step == 3:
            self.stop.handle(signal.SIGTERM, None)
        original(self, progress, batches, result)

    monkeypatch.setattr(Checkpoint, "after_step", after_step)
    assert run(["train", str(parts)]) == 75
    monkeypatch.setattr(Checkpoint, "after_step", original)
    assert run(["train", str(parts), "--resume"]) == 0
    file = "model/model.safetensors" if method["kind"] == "full" else "adapter/adapter_model.safetensors"
    expected, found = (load_file(tmp_path / name / file) for name in ("whole", "parts"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    lines = [
        [
            record["regularizers"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            if (record := json.loads(line))["kind"] == "train"
        ]
        for name in ("whole", "parts")
    ]
    assert lines[0] == lines[1]
    assert lines[0][-1].keys() == {"kl.0", "kl.1", "l2_sp", "ewc"}
    assert json.loads((tmp_path / "whole" / "manifest.json").read_text())["summary"]["regularizers"] == lines[0][-1]


@pytest.mark.parametrize(
    ("regularizer", "words"),
    [
        ({"kind": "ewc"}, "no training source has `role: replay` to measure on"),
        ({"kind": "kl", "on": "replay"}, "no training source has `role: replay`"),
        (
            {"kind": "ewc", "earlier": "nowhere", "rows": {"source": {"kind": "builtin", "name": "stories"}}, "examples": 1},
            "has no fisher.safetensors",
        ),
    ],
    ids=["ewc", "kl", "earlier"],
)
def test_what_has_nothing_to_hold_on_to_is_refused(
    tmp_path: Path, regularizer: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file(
        tmp_path,
        "none",
        data={"train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 5}], "max_length": 128},
        objective={"kind": "causal-lm", "regularize": [regularizer]},
    )
    assert run(["train", str(path)]) == 2
    assert words in capsys.readouterr().err
