"""AdaLoRA and IA3 on tiny real models: identity, ranks that move, files, merges, resume."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tests.laws.registered import Bench, make_bench

from ftcli.errors import RequestError
from ftcli.methods.adalora import Adalora
from ftcli.methods.context import AttachContext
from ftcli.methods.ia3 import Ia3
from ftcli.methods.layer_roles import closing_layers, keys_and_values
from ftcli.methods.rank_budget import adalora_layers, budget_of
from ftcli.models.load import load_model
from ftcli.models.settings import Init, Model

VOCABULARY = 61
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
NEOX = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "phi3": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4},
    "gpt_neox": NEOX,
    "phi": SMALL | {"num_key_value_heads": 4},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
LIVED = ["llama", "qwen2", "phi3", "mixtral", "gpt2"]


@cache
def _kept(name: str) -> Any:
    special = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    special["init_std" if name == "opt" else "initializer_range"] = 0.2  # type: ignore[assignment]
    return load_model(Model(init=Init(architecture=name, config={**special, **SIZES[name]})), None, seed=3)


def base(name: str) -> Any:
    """A fresh copy of a tiny random model, with biases that are not zero."""
    model = copy.deepcopy(_kept(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return model


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module.eval()(IDS).logits
    return found


def train_some(method: Any, module: Any, lr: float, num_steps: int = 6) -> None:
    module.train()
    optimizer = torch.optim.Adam(method.parameter_groups(module, lr, 0.0))
    for step in range(1, num_steps + 1):
        optimizer.zero_grad()
        module(IDS, labels=IDS).loss.backward()
        optimizer.step()
        method.after_update(module, step, num_steps)


@pytest.mark.parametrize("method", [Adalora(initial_rank=6, rank=3), Ia3(), Ia3(target_modules="keys-values-inner")], ids=repr)
@pytest.mark.parametrize("name", LIVED)
def test_it_starts_at_the_base_moves_only_itself_reloads_and_merges(method: Any, name: str, tmp_path: Path) -> None:
    plain = logits(base(name))
    module = method.attach(base(name), AttachContext(seed=5))
    assert torch.equal(logits(module), plain)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    train_some(method, module, lr=0.05)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    # a layer that lost all its singular values has those of the start: zeros
    empty = {n for n, p in module.named_parameters() if ".lora_E." in n and not p.any()}
    assert moved | empty == {n for n, p in module.named_parameters() if p.requires_grad}
    trained = logits(module)
    assert (trained - plain).abs().max() > 1e-2
    method.save(module, tmp_path)
    torch.testing.assert_close(logits(method.load(base(name), tmp_path)), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(module), trained, rtol=0, atol=0)
    merged = method.merge(module)
    assert {type(m) for m in merged.modules()} == {type(m) for m in base(name).modules()}
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-4)


def test_the_final_ranks_are_the_budget_and_only_they_are_saved(tmp_path: Path) -> None:
    method = Adalora(initial_rank=6, rank=2)
    module = method.attach(base("llama"), AttachContext(seed=5))
    train_some(method, module, lr=0.05, num_steps=10)
    ranks = [int((layer.lora_E["default"] != 0).sum()) for _, layer in adalora_layers(module)]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1
    method.save(module, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(len(tensor) for name, tensor in saved.items() if "lora_E" in name) == sorted(ranks)
    from peft import PeftModel

    elsewhere = PeftModel.from_pretrained(base("llama"), str(tmp_path))
    torch.testing.assert_close(logits(elsewhere), logits(module), rtol=0, atol=1e-5)


def test_an_adapter_saved_before_the_ranks_are_final_is_whole(tmp_path: Path) -> None:
    """A singular value that came back after the last choice is no zero, and must not be left out."""
    method = Adalora(initial_rank=6, rank=2)
    module = method.attach(base("llama"), AttachContext(seed=5))
    train_some(method, module, lr=0.05, num_steps=10)
    with torch.no_grad():
        for _, layer in adalora_layers(module):
            layer.lora_E["default"].add_(0.5)
    method.save(module, tmp_path)
    torch.testing.assert_close(logits(method.load(base("llama"), tmp_path)), logits(module), rtol=0, atol=1e-5)


def test_the_budget_falls_from_all_to_the_final_number() -> None:
    budgets = [budget_of(step, 2, 8, 60, 20) for step in range(1, 11)]
    assert budgets[:2] == [60, 60]
    assert budgets[7:] == [20, 20, 20]
    assert budgets == sorted(budgets, reverse=True)
    assert budget_of(1, 0, 1, 60, 20) == 20


def test_ranks_that_leave_nothing_to_choose_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"`initial_rank` \(8\) is not above `rank` \(8\)"):
        Adalora(initial_rank=8)
    with pytest.raises(ValidationError, match="more than the whole run"):
        Adalora(warmup_ratio=0.8, final_ratio=0.3)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("adalora"), lr=1e-2)


def test_the_penalty_draws_the_singular_vectors_towards_orthogonal_ones(bench: Bench) -> None:
    def distance(orthogonality: float) -> float:
        module = bench.run(Adalora(orthogonality=orthogonality), 8).module
        found = [layer.lora_A["default"] @ layer.lora_A["default"].T for _, layer in adalora_layers(module)]
        return float(sum(torch.linalg.matrix_norm(product - torch.eye(len(product))).detach() for product in found))

    assert distance(5.0) < distance(0.0)


def test_resumed_adalora_equals_the_uninterrupted_one(bench: Bench) -> None:
    """The kept state is all there is beside weights and optimizer: steps 4 to 6 from it are the same bits."""
    method = Adalora(initial_rank=6, rank=2)
    gradients = torch.Generator().manual_seed(0)
    modules = [method.attach(base("llama"), AttachContext(seed=5)) for _ in range(2)]
    noise = [{n: torch.randn(p.shape, generator=gradients) for n, p in modules[0].named_parameters() if p.requires_grad} for _ in range(6)]

    def step_with(module: Any, step: int) -> None:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.grad = noise[step - 1][name]
                parameter.data.sub_(0.01 * parameter.grad)
        method.after_update(module, step, 6)

    for step in range(1, 7):
        step_with(modules[0], step)
        if step == 3:
            state = {name: tensor.clone() for name, tensor in method.state(modules[0]).items()}
            weights = {n: p.detach().clone() for n, p in modules[0].named_parameters()}
    modules[1].load_state_dict(weights, strict=False)
    method.restore(modules[1], state)
    for step in range(4, 7):
        step_with(modules[1], step)
    assert all(torch.equal(p, dict(modules[1].named_parameters())[n]) for n, p in modules[0].named_parameters())
    assert method.state(modules[1]).keys() == method.state(modules[0]).keys()
    assert all(torch.equal(tensor, method.state(modules[1])[name]) for name, tensor in method.state(modules[0]).items())


@pytest.mark.parametrize(
    ("name", "keys", "closing"),
    [
        ("llama", {"k_proj", "v_proj"}, {"down_proj"}),
        ("phi3", {"qkv_proj"}, {"down_proj"}),
        ("mixtral", {"k_proj", "v_proj"}, set()),
        ("gpt2", {"c_attn"}, {"c_proj"}),
        ("gpt_neox", {"query_key_value"}, {"dense_4h_to_h"}),
        ("phi", {"k_proj", "v_proj"}, {"fc2"}),
        ("opt", {"k_proj", "v_proj"}, {"fc2"}),
    ],
)
def test_roles_of_layers(name: str, keys: set[str], closing: set[str]) -> None:
    model = base(name)
    assert {found.rpartition(".")[2] for found in keys_and_values(model)} == keys
    assert {found.rpartition(".")[2] for found in closing_layers(model)} == closing
    assert all("attn" not in found for found in closing_layers(model))
    assert len(keys_and_values(model)) == 2 * len(keys)


def test_ia3_scales_outputs_of_keys_and_values_and_inputs_of_what_closes() -> None:
    module: Any = Ia3(target_modules="keys-values-inner").attach(base("llama"), AttachContext(seed=5))
    shapes = {n.split(".")[-3]: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
    assert shapes == {"k_proj": (16, 1), "v_proj": (16, 1), "down_proj": (1, 48)}
    assert all(torch.equal(p, torch.ones_like(p)) for p in module.parameters() if p.requires_grad)
    chosen: Any = Ia3(feedforward_modules=("up_proj",)).attach(base("llama"), AttachContext(seed=5))
    shapes = {n.split(".")[-3]: tuple(p.shape) for n, p in chosen.named_parameters() if p.requires_grad}
    assert shapes["up_proj"] == (1, 32)
    assert shapes["down_proj"] == (32, 1)


def test_factors_of_one_have_no_weight_decay_nor_have_singular_vectors() -> None:
    ia3 = Ia3().parameter_groups(Ia3().attach(base("llama"), AttachContext(seed=5)), 1e-3, 0.1)
    assert {group["weight_decay"] for group in ia3} == {0.0}
    module = Adalora().attach(base("llama"), AttachContext(seed=5))
    groups = Adalora().parameter_groups(module, 1e-3, 0.1)
    decays = {name.split(".")[-2]: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays == {"lora_E": 0.1, "lora_A": 0.0, "lora_B": 0.0}
    assert sum(len(group["names"]) for group in groups) == sum(p.requires_grad for p in module.parameters())


def test_an_ia3_adapter_of_other_targets_is_refused(tmp_path: Path) -> None:
    method = Ia3(target_modules=("k_proj", "v_proj"))
    method.save(method.attach(base("llama"), AttachContext(seed=5)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["k_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="2 tensors without a place in the model"):
        method.load(base("llama"), tmp_path)


def test_a_stopped_run_resumes_to_the_same_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from ftcli.cli.main import run
    from ftcli.training.hooks import Checkpoint

    def recipe(name: str) -> Path:
        document = {
            "version": 1,
            "name": name,
            "model": {"init": {"architecture": "llama", "config": SMALL}, "tokenizer": "builtin:tiny"},
            "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 11}], "max_length": 256, "holdout": 0.0},
            "method": {"kind": "adalora", "rank": 2, "initial_rank": 4, "dropout": 0.1},
            "train": {"steps": 8, "global_batch_size": 4, "lr": 1e-2},
            "every": {"log": 4, "save": 3},
            "output": str(tmp_path / name),
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(document))
        return tmp_path / f"{name}.yaml"

    assert run(["train", str(recipe("whole"))]) == 0
    original = Checkpoint.after_step

    def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any) -> None:
        if progress.step == 2:
            self.stop.handle(signal.SIGTERM, None)
        original(self, progress, batches, result)

    monkeypatch.setattr(Checkpoint, "after_step", after_step)
    assert run(["train", str(recipe("parts"))]) == 75
    monkeypatch.setattr(Checkpoint, "after_step", original)
    assert run(["train", str(tmp_path / "parts.yaml"), "--resume"]) == 0
    expected = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    found = load_file(tmp_path / "parts" / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
