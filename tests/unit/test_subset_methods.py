"""Methods that train a part of the model's own weights: which part, what rests when, and results that load anywhere."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.laws import test_two_processes
from tests.laws.registered import Bench, make_bench
from tests.laws.test_resume import assert_same, recipe

from ftcli.cli.main import run
from ftcli.errors import RequestError
from ftcli.methods.bitfit import Bitfit
from ftcli.methods.context import AttachContext
from ftcli.methods.freeze import Freeze
from ftcli.methods.hft import Hft, resting_half, units_by_layer
from ftcli.methods.lisa import Lisa
from ftcli.methods.norms import Norms
from ftcli.methods.parameter_groups import trained_parameters
from ftcli.models.load import load_model, save_weights
from ftcli.models.settings import Init, Model

VOCABULARY = 97
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64, **NO_DROPOUT},
    ),
    "qwen2": ("qwen2", LLAMA),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**LLAMA, **EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", {**LLAMA, **EXPERTS, "num_experts": 3}),
}
IDS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
CONTEXT = AttachContext(seed=5)
METHODS = [Freeze(), Bitfit(), Norms(), Hft(), Hft(granularity="layer"), Hft(granularity="model"), Lisa(sampled_layers=1, period_steps=1)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A random model of each architecture, with vectors that are not all alike."""
    found = {}
    for name, (architecture, sizes) in BASES.items():
        special = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
        model = load_model(Model(init=Init(architecture=architecture, config={**special, **sizes})), None, seed=3)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(4)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp(name)
        save_weights(model, folder)
        found[name] = Model(base=str(folder))
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("subset"), lr=1e-2)


def attached(method: Any, base: Model) -> Any:
    return method.attach(load_model(base, None), CONTEXT)


def names(module: Any) -> set[str]:
    """What trains, `weight` left out."""
    return {name.removesuffix(".weight") for name, _ in trained_parameters(module)}


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module.eval()(IDS).logits
    return found


def train_some(method: Any, module: Any, steps: int = 2) -> set[str]:
    """Take a few steps; the names of what was at work in one of them."""
    module.train()
    optimizer = torch.optim.SGD(method.parameter_groups(module, 0.05, 0.0))
    at_work: set[str] = set()
    for step in range(1, steps + 1):
        method.before_step(module, step, steps, 17)
        module(IDS, labels=IDS).loss.backward()
        at_work |= {name for name, p in module.named_parameters() if p.requires_grad}
        assert all(p.grad is None for p in module.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    return at_work


# ---- every method on every architecture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(BASES))
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.kind} {getattr(method, 'granularity', '')}".strip())
def test_starts_as_the_base_moves_its_part_alone_and_loads_in_plain_transformers(
    method: Any, name: str, bases: dict[str, Model], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    if isinstance(method, Bitfit) and name in ("llama", "tied", "mixtral", "qwen3_moe"):
        with pytest.raises(RequestError, match="has no biases"):
            attached(method, bases[name])
        return
    base = load_model(bases[name], None)
    module = attached(method, bases[name])
    assert torch.equal(logits(module), logits(base))
    before = {key: parameter.detach().clone() for key, parameter in module.named_parameters()}
    at_work = train_some(method, module)
    moved = {key for key, parameter in module.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved == at_work
    assert at_work < set(before) or method.kind == "lisa"
    method.save(module, tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(module))
    assert torch.equal(logits(method.load(base, tmp_path)), logits(module))
    assert method.merge(module) is module


# ---- freeze --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "model.layers.{2-3}, model.norm"),
        ({"top_layers": 1}, "model.layers.3, model.norm"),
        ({"top_layers": 1, "final_norm": False}, "model.layers.3"),
        ({"layers": (0, -1)}, "model.layers.{0,3}, model.norm"),
        ({"patterns": ("q_proj", "layers.[01].*norm")}, None),
        ({"patterns": ("layers.2",)}, "model.layers.2"),
        ({"patterns": ("norm.weight",)}, "model.norm"),
        ({"top_layers": 0, "head": True}, "lm_head"),
        ({"top_layers": 1, "embeddings": True}, "model.embed_tokens, model.layers.3, model.norm"),
        ({"top_layers": 4, "embeddings": True, "head": True}, "model, lm_head"),
    ],
)
def test_freeze_trains_what_it_says(fields: dict[str, Any], words: str | None, bases: dict[str, Model]) -> None:
    method = Freeze(**fields)
    module = attached(method, bases["llama"])
    if words is not None:
        assert method.what_trains(module) == words
    else:
        assert method.what_trains(module) == (
            "model.layers.{0-3}.self_attn.q_proj, model.layers.{0-1}.input_layernorm, model.layers.{0-1}.post_attention_layernorm"
        )


def test_freeze_finds_the_parts_of_gpt2(bases: dict[str, Model]) -> None:
    module = attached(Freeze(top_layers=1, embeddings=True), bases["gpt2"])
    assert Freeze().what_trains(module) == "transformer.wte, transformer.wpe, transformer.h.3, transformer.ln_f"
    assert names(attached(Freeze(patterns=("c_attn.bias",)), bases["gpt2"])) == {f"transformer.h.{n}.attn.c_attn.bias" for n in range(4)}


def test_a_tied_head_trains_with_the_embedding_or_not_at_all(bases: dict[str, Model]) -> None:
    module = attached(Freeze(top_layers=0, embeddings=True), bases["tied"])
    assert names(module) == {"model.embed_tokens"}
    assert module.lm_head.weight.requires_grad
    assert names(attached(Freeze(top_layers=0, embeddings=True, head=True), bases["tied"])) == {"model.embed_tokens"}
    for fields, message in (
        ({"head": True}, r"method.head: `head: true` and `embeddings: false`, and head and embedding of this model are one weight"),
        ({"head": False, "embeddings": True}, r"method.embeddings: `embeddings: true` and `head: false`"),
        ({"patterns": ("lm_head",)}, r"method.patterns.0: `lm_head` names the embedding, and the output head"),
    ):
        with pytest.raises(RequestError, match=message):
            attached(Freeze(**fields), bases["tied"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patterns": ("q_porj",)}, r"(?s)`q_porj` matches no module or parameter .*did you mean `q_proj`"),
        ({"layers": (4, -5, 1)}, "4, -5 of a model with 4 decoder layers"),
        ({"top_layers": 5}, "method.top_layers: 5 of a model with 4 decoder layers"),
        ({"top_layers": 0}, "nothing would train"),
    ],
)
def test_freeze_refuses_what_is_not_there(fields: dict[str, Any], message: str, bases: dict[str, Model]) -> None:
    with pytest.raises(RequestError, match=message):
        attached(Freeze(**fields), bases["llama"])


def test_top_layers_and_layers_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="`top_layers` and `layers` are both given"):
        Freeze(top_layers=1, layers=(0,))


def test_the_resolved_settings_train_the_same(bases: dict[str, Model]) -> None:
    for method in (Freeze(), Freeze(embeddings=True), Freeze(patterns=("q_proj",))):
        again = Freeze.model_validate_json(method.model_dump_json())
        assert names(attached(method, bases["tied"])) == names(attached(again, bases["tied"]))


# ---- bitfit and norms ----------------------------------------------------------------------------------------------------------


def test_bitfit_says_that_there_are_no_biases_and_what_would_help(bases: dict[str, Model]) -> None:
    with pytest.raises(RequestError, match=r"(?s)`llama` has no biases.*hint: method.add_biases: true"):
        attached(Bitfit(), bases["llama"])
    with pytest.raises(RequestError, match=r"(?s)`mixtral` has no biases.*hint: method.kind: norms"):
        attached(Bitfit(), bases["mixtral"])
    with pytest.raises(RequestError, match=r"method.add_biases: `mixtral` has no switch for biases that is off"):
        attached(Bitfit(add_biases=True), bases["mixtral"])


@pytest.mark.parametrize(("name", "count"), [("llama", 4 * 7), ("tied", 4 * 7), ("qwen3_moe", 4 * 4)])
def test_added_biases_begin_at_zero_and_load_in_plain_transformers(name: str, count: int, bases: dict[str, Model], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    method = Bitfit(add_biases=True)
    module = attached(method, bases[name])
    assert torch.equal(logits(module), logits(load_model(bases[name], None)))
    assert len(names(module)) == count
    assert all(name.endswith("bias") for name in names(module))
    moved = train_some(method, module)
    assert len(moved) == count
    method.save(module, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(module))
    assert loaded.config.attention_bias is True
    assert any(parameter.abs().max() > 0 for key, parameter in loaded.named_parameters() if key.endswith("o_proj.bias"))


def test_norms_are_found_by_what_they_are(bases: dict[str, Model]) -> None:
    assert len(names(attached(Norms(), bases["llama"]))) == 4 * 2 + 1
    assert len(names(attached(Norms(), bases["gpt2"]))) == 2 * (4 * 2 + 1)
    assert len(names(attached(Norms(), bases["qwen3_moe"]))) == 4 * 4 + 1


# ---- hft -----------------------------------------------------------------------------------------------------------------------


def category_of(name: str) -> str:
    return "attn" if "attn." in name else "norm" if "norm" in name else "ffn"


def test_half_of_every_category_rests(bases: dict[str, Model]) -> None:
    module = attached(Hft(), bases["llama"])
    for number in range(20):
        resting = resting_half(module, "category", (17, "hft", number))
        by_layer = [Counter(category_of(name) for name in resting if f".{layer}." in name) for layer in range(4)]
        assert all(counts["attn"] == 2 and counts["norm"] == 1 for counts in by_layer)
        assert sorted(counts["ffn"] for counts in by_layer) == [1, 1, 2, 2]
        assert not any("embed" in name or "lm_head" in name or name == "model.norm.weight" for name in resting)


def test_every_matrix_rests_about_half_of_the_rounds(bases: dict[str, Model]) -> None:
    module = attached(Hft(), bases["llama"])
    for granularity in ("category", "layer", "model"):
        counts = Counter(name for number in range(400) for name in resting_half(module, granularity, (17, "hft", number)))  # type: ignore[arg-type]
        assert len(counts) == 4 * 9
        assert 150 < min(counts.values()) <= max(counts.values()) < 250


def test_experts_and_biases_rest_with_their_matrices(bases: dict[str, Model]) -> None:
    units = units_by_layer(attached(Hft(), bases["qwen2_moe"]))[0]
    assert ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias") in units["attention"]
    assert ("model.layers.0.mlp.experts.gate_up_proj",) in units["feed_forward"]
    assert {name for owned in units.values() for unit in owned for name in unit} == {
        name for name, _ in attached(Hft(), bases["qwen2_moe"]).named_parameters() if ".layers.0." in name
    }


def resting(module: Any) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("method", [Hft(round_steps=3), Lisa(sampled_layers=1, period_steps=3)], ids=lambda method: method.kind)
def test_what_rests_depends_on_seed_and_step_alone(method: Any, bases: dict[str, Model]) -> None:
    module, other = attached(method, bases["llama"]), attached(method, bases["llama"])
    seen = []
    for step in range(1, 25):
        method.before_step(module, step, 24, 17)
        seen.append(resting(module))
    assert all(seen[step] == seen[step - step % 3] for step in range(24))
    assert len({frozenset(names) for names in seen}) > 2
    method.before_step(other, 20, 99, 17)
    assert resting(other) == seen[19]
    method.before_step(other, 20, 99, 18)
    different = [resting(other)]
    method.before_step(other, 1, 99, 18)
    assert [*different, resting(other)] != [seen[19], seen[0]]


def test_by_default_one_half_rests_for_the_whole_run(bases: dict[str, Model]) -> None:
    module = attached(Hft(), bases["llama"])
    found = set()
    for step in (1, 10, 1000):
        Hft().before_step(module, step, 1000, 17)
        found.add(frozenset(resting(module)))
    assert len(found) == 1


# ---- lisa ----------------------------------------------------------------------------------------------------------------------


def test_lisa_calls_up_every_layer_in_time_and_as_many_as_it_says() -> None:
    method = Lisa(sampled_layers=2, period_steps=5)
    drawn = [method.layers_at_work(step, 8, 17) for step in range(1, 1001, 5)]
    assert {len(layers) for layers in drawn} == {2}
    counts = Counter(number for layers in drawn for number in layers)
    assert len(counts) == 8
    assert all(25 < count < 75 for count in counts.values())  # 50 each on average


def test_the_memory_check_counts_what_is_at_work(bases: dict[str, Model]) -> None:
    from ftcli.training.resources import training_bytes

    module = attached(Lisa(), bases["llama"])
    sizes = {name: 4 * parameter.numel() for name, parameter in module.named_parameters()}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    at_work = sum(sizes.values()) - 2 * layer
    assert training_bytes(module, Lisa().share_at_work(module)) == pytest.approx(sum(sizes.values()) + 3 * at_work, abs=1)


def test_lisa_refuses_more_layers_than_there_are(bases: dict[str, Model]) -> None:
    with pytest.raises(RequestError, match=r"method.sampled_layers: 5 of a model with 4 decoder layers"):
        attached(Lisa(sampled_layers=5), bases["llama"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_what_is_at_work_has_state_and_gradients(optimizer: str, bench: Bench) -> None:
    from ftcli.optim.optimizers.adamw import AdamW
    from ftcli.optim.optimizers.muon import Muon
    from ftcli.training.assemble import assemble_learner, make_accelerator
    from ftcli.training.step import optimizer_step

    method = Lisa(sampled_layers=1, period_steps=1)
    bench = bench.with_train(optimizer=AdamW() if optimizer == "adamw" else Muon())
    recipe, parts = bench.parts(method)
    learner, batches = assemble_learner(recipe, bench.data, parts, make_accelerator(recipe, None))
    norms: list[float] = []
    module = parts.module
    for step in range(1, 9):
        original = learner.optimizer.step

        def step_and_look(original: Any = original) -> None:
            norms.append(float(torch.stack([p.grad.norm() for p in module.parameters() if p.requires_grad and p.grad is not None]).norm()))
            original()

        learner.optimizer.step = step_and_look  # type: ignore[method-assign]
        result = optimizer_step(learner, batches.at(step), 1.0)
        learner.optimizer.step = original  # type: ignore[method-assign]
        # what is clipped is the norm of this step's gradients, and nothing else has one
        assert norms[-1] == pytest.approx(min(1.0, result.grad_norm), rel=1e-4)
        with_state = {name for name, p in module.named_parameters() if learner.optimizer.state.get(p)}
        assert with_state == {name for name, p in module.named_parameters() if p.requires_grad}
    assert len({method.layers_at_work(step, 2, recipe.train.seed) for step in range(1, 9)}) == 2


# ---- runs ----------------------------------------------------------------------------------------------------------------------


def with_method(path: Path, method: dict[str, Any]) -> Path:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "method": method}))
    return path


HFT, LISA = {"kind": "hft", "round_steps": 3}, {"kind": "lisa", "sampled_layers": 1, "period_steps": 3}


@pytest.mark.parametrize(("method", "optimizer"), [(HFT, "adamw"), (HFT, "apollo"), (LISA, "muon"), (LISA, "galore")])
def test_a_resumed_run_equals_an_uninterrupted_one(
    method: dict[str, Any], optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a round, right after a save and between saves; checkpoints hold parameters that never had a gradient."""
    from ftcli.training.hooks import Checkpoint

    settings = {"kind": optimizer, **({"update_projection_every": 4} if optimizer in ("galore", "apollo") else {})}
    whole = with_method(recipe(tmp_path, "whole", optimizer=settings, steps=10), method)
    parts = with_method(recipe(tmp_path, "parts", optimizer=settings, steps=10), method)
    assert run(["train", str(whole)]) == 0
    original = Checkpoint.after_step
    for stop_after in (2, 8):

        def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any, stop_after: int = stop_after) -> None:
            if progress.step == stop_after:
                self.stop.handle(signal.SIGTERM, None)
            original(self, progress, batches, result)

        monkeypatch.setattr(Checkpoint, "after_step", after_step)
        assert run(["train", str(parts), "--resume"]) == 75
    monkeypatch.setattr(Checkpoint, "after_step", original)
    assert run(["train", str(parts), "--resume"]) == 0
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_two_processes_let_the_same_layers_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_two_processes.RECIPE, "method", {"kind": "lisa", "sampled_layers": 1, "period_steps": 1})
    alone, together = test_two_processes.trained(tmp_path, 1), test_two_processes.trained(tmp_path, 2)
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-6


def test_a_run_says_what_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_method(recipe(tmp_path, "said", steps=1), {"kind": "freeze", "top_layers": 1})
    assert run(["train", str(path)]) == 0
    assert "trains model.layers.1, model.norm\n" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "said" / "manifest.json").read_text())
    assert manifest["what_trains"] == "model.layers.1, model.norm"
