"""Methods on tiny real models: identity at the start, what is frozen, files, and merges."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ftcli.errors import RequestError
from ftcli.methods.adapter import lora_layers, merge_adapter, plain_weight
from ftcli.methods.context import AttachContext
from ftcli.methods.full import Full
from ftcli.methods.lora import Lora
from ftcli.methods.low_rank import LowRank
from ftcli.methods.qlora import Qlora
from ftcli.models.load import load_model, load_weights, save_weights
from ftcli.models.quantisation import Quantization, is_quantised
from ftcli.models.settings import Init, Model

VOCABULARY = 97
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen2": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
    "gemma": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "head_dim": 8,
    },
}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "qwen2": "embed_tokens", "gemma": "embed_tokens"}
NORM = {"llama": "norm", "gpt2": "ln_f", "qwen2": "norm", "gemma": "norm"}
IDS = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
INITS = ["default", "pissa", "olora", "eva"]
LORA_CASES = [*itertools.product(["llama"], ["plain", "rslora", "dora"], INITS), ("gpt2", "plain", "olora"), ("gpt2", "dora", "pissa")]
QLORA_CASES = [*LORA_CASES, ("llama", "plain", "loftq"), ("llama", "dora", "loftq"), ("gpt2", "rslora", "loftq")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """A random model of each architecture, with weights large enough for quantisation to show."""
    found = {}
    for name, sizes in SIZES.items():
        special = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
        model = load_model(Model(init=Init(architecture=name, config={**special, **sizes})), None, seed=3)
        folder = tmp_path_factory.mktemp(name)
        save_weights(model, folder)
        found[name] = Model(base=str(folder))
    return found


def load_base(base: Model, method: LowRank | Full) -> Any:
    return load_model(base, None, quantization=method.quantization())


def context(base: Model, seed: int = 5) -> AttachContext:
    def batches(count: int) -> list[dict[str, torch.Tensor]]:
        mask = torch.ones_like(IDS)
        mask[0, 10:] = 0
        return [{"input_ids": (IDS + index) % VOCABULARY, "attention_mask": mask} for index in range(count)]

    return AttachContext(seed=seed, sample_batches=batches, original_base=lambda: load_model(base, None))


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module.eval()(IDS).logits
    return found


def train_some(method: LowRank | Full, module: Any, lr: float = 0.02, steps: int = 3) -> list[float]:
    module.train()
    optimizer = torch.optim.SGD(method.parameter_groups(module, lr, 0.0))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(IDS, labels=IDS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    first, second = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def check_life(method: LowRank, base: Model, folder: Path) -> None:
    """Attach, train, save, load, merge, write: every law of a method on one model."""
    module = method.attach(load_base(base, method), context(base))
    plain = logits(load_base(base, method))
    if method.init != "loftq":
        torch.testing.assert_close(logits(module), plain, rtol=0, atol=1e-4)
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    losses = train_some(method, module)
    assert losses[-1] < losses[0]
    assert all(torch.equal(before, dict(module.named_parameters())[name]) for name, before in frozen.items())
    trained = logits(module)
    assert (trained - plain).abs().max() > 1e-2
    method.save(module, folder / "adapter")
    reloaded = method.load(load_base(base, method), folder / "adapter")
    torch.testing.assert_close(logits(reloaded), trained, rtol=0, atol=1e-4)
    merged = method.merge(module)
    assert not any(is_quantised(layer) or "lora" in name for name, layer in merged.named_modules())
    assert kl(trained, logits(merged)) < 1e-6
    assert torch.equal(trained.argmax(-1), logits(merged).argmax(-1))
    save_weights(merged, folder / "merged")
    assert torch.equal(logits(load_weights(folder / "merged", like=merged)), logits(merged))


@pytest.mark.parametrize(("name", "variant", "init"), LORA_CASES)
def test_lora_starts_at_identity_trains_only_itself_and_merges_exactly(
    name: str, variant: Any, init: Any, bases: dict[str, Model], tmp_path: Path
) -> None:
    check_life(Lora(rank=4, variant=variant, init=init, rank_pattern={"mlp.*": 6}), bases[name], tmp_path)


@pytest.mark.parametrize(("name", "variant", "init"), QLORA_CASES)
def test_qlora_starts_at_identity_trains_only_itself_and_merges_exactly(
    name: str, variant: Any, init: Any, bases: dict[str, Model], tmp_path: Path
) -> None:
    check_life(Qlora(rank=4, variant=variant, init=init, rank_pattern={"mlp.*": 6}), bases[name], tmp_path)


@pytest.mark.parametrize("quantize", [Quantization(format="fp4", double_quant=False), Quantization(format="int8")])
@pytest.mark.parametrize("name", list(SIZES))
def test_qlora_lives_in_every_format(name: str, quantize: Quantization, bases: dict[str, Model], tmp_path: Path) -> None:
    check_life(Qlora(rank=4, quantize=quantize), bases[name], tmp_path)


@pytest.mark.parametrize("method", [Lora, Qlora])
@pytest.mark.parametrize("name", list(SIZES))
def test_modules_trained_in_full_are_saved_merged_and_stay_tied(name: str, method: Any, bases: dict[str, Model], tmp_path: Path) -> None:
    adapted = method(rank=4, variant="dora", init="pissa", extra_trained_modules=(EMBEDDING[name], NORM[name]))
    check_life(adapted, bases[name], tmp_path)
    module = adapted.attach(load_base(bases[name], adapted), context(bases[name]))
    was_tied = module.get_base_model().config.tie_word_embeddings
    train_some(adapted, module)
    merged = adapted.merge(module)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == was_tied
    assert any("tok" in n or "wte" in n for n in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"])


def test_saved_adapter_works_in_plain_peft_on_the_original_base(bases: dict[str, Model], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for number, (variant, init) in enumerate([("plain", "pissa"), ("rslora", "olora"), ("dora", "pissa")]):
        method = Lora(rank=4, variant=variant, init=init, rank_pattern={"down_proj": 2})  # type: ignore[arg-type]
        module = method.attach(load_base(bases["llama"], method), context(bases["llama"]))
        train_some(method, module)
        folder = tmp_path / str(number)
        method.save(module, folder)
        original = AutoModelForCausalLM.from_pretrained(str(bases["llama"].base))
        torch.testing.assert_close(logits(PeftModel.from_pretrained(original, folder)), logits(module), rtol=0, atol=1e-4)


def test_initial_adapter_depends_on_the_seed_alone(bases: dict[str, Model]) -> None:
    def initial(seed: int, disturbance: int) -> torch.Tensor:
        torch.manual_seed(disturbance)
        method = Lora(rank=4)
        module = method.attach(load_base(bases["llama"], method), context(bases["llama"], seed))
        return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])

    assert torch.equal(initial(1, 10), initial(1, 11))
    assert not torch.equal(initial(1, 10), initial(2, 10))


def test_attaching_gives_no_warnings_also_for_conv1d(bases: dict[str, Model]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("gpt2", "gemma"):
            Lora(rank=2, extra_trained_modules=(EMBEDDING[name],)).attach(load_base(bases[name], Lora()), context(bases[name]))


@pytest.mark.parametrize(
    "method", [Lora(rank=4, variant="dora"), Lora(rank=4, init="pissa", extra_trained_modules=("embed_tokens", "norm"))]
)
def test_adapter_is_float32_beside_a_bfloat16_base_and_the_start_is_identity(method: Lora, bases: dict[str, Model]) -> None:
    base = load_model(bases["gemma"], None, dtype="bfloat16")
    plain = logits(load_model(bases["gemma"], None, dtype="bfloat16"))
    module = method.attach(base, context(bases["gemma"]))
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert kl(plain.float(), logits(module).float()) < 1e-3
    losses = train_some(method, module)
    assert losses[-1] < losses[0]
    assert method.merge(module).dtype == torch.bfloat16


def test_dora_starts_from_row_lengths_in_float32(bases: dict[str, Model]) -> None:
    method = Lora(rank=4, variant="dora")
    module: Any = method.attach(load_model(bases["llama"], None, dtype="bfloat16"), context(bases["llama"]))
    for _, layer in lora_layers(module.get_base_model()):
        lengths = layer.get_base_layer().weight.float().norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), lengths, rtol=1e-6, atol=0)


def test_loftq_starts_nearer_to_the_original_than_quantisation_alone(bases: dict[str, Model]) -> None:
    original = load_model(bases["llama"], None)
    method = Qlora(rank=8, init="loftq")
    module = method.attach(load_base(bases["llama"], method), context(bases["llama"]))
    for name, layer in lora_layers(module.get_base_model()):  # type: ignore[operator]
        weight, stored = plain_weight(original.get_submodule(name)), plain_weight(layer.get_base_layer())
        correction = layer.get_delta_weight("default").detach()
        assert (weight - stored - correction).norm() < 0.9 * (weight - stored).norm()


def test_eva_needs_as_many_tokens_as_its_rank(bases: dict[str, Model]) -> None:
    method = Lora(rank=8, init="eva")
    few = [{"input_ids": IDS[:1, :4], "attention_mask": torch.ones(1, 4, dtype=torch.int64)}]
    with pytest.raises(RequestError, match="at least 8 tokens of training data, found 4"):
        method.attach(load_base(bases["llama"], method), AttachContext(seed=1, sample_batches=lambda count: few))


def test_restoring_a_checkpoint_needs_no_data(bases: dict[str, Model]) -> None:
    for method in (Lora(rank=4, init="eva"), Qlora(rank=4, init="loftq"), Lora(rank=4, init="pissa")):
        module = method.attach(load_base(bases["llama"], method), context(bases["llama"]))
        train_some(method, module)
        kept = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        again = method.attach(load_base(bases["llama"], method), AttachContext(seed=5, restoring=True))
        with torch.no_grad():
            for name, parameter in again.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(kept.pop(name))
        assert not kept
        assert torch.equal(logits(again), logits(module))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ("q_porj",)}, "`q_porj` matches no linear layer .there are: q_proj, k_proj"),
        ({"target_modules": ("proj",)}, "`proj` matches no linear layer"),
        ({"target_modules": ("lm_head",)}, "tied to the embedding"),
        ({"rank_pattern": {"mlp.gate": 4}}, "`mlp.gate` matches no target"),
        ({"extra_trained_modules": ("embed_token",)}, "did you mean `embed_tokens`"),
        ({"init": "pissa", "rank": 33}, "33 is more than `model.layers.0.self_attn.q_proj` has: 32 x 32"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields: dict[str, Any], message: str, bases: dict[str, Model]) -> None:
    method = Lora(**fields)
    with pytest.raises(RequestError, match=message):
        method.attach(load_base(bases["gemma"], method), context(bases["gemma"]))


def test_patterns_choose_layers(bases: dict[str, Model]) -> None:
    def targets(name: str, *patterns: str) -> list[str]:
        method = Lora(rank=2, target_modules=patterns) if patterns else Lora(rank=2)
        return [layer for layer, _ in lora_layers(method.attach(load_base(bases[name], method), context(bases[name])).get_base_model())]  # type: ignore[operator]

    assert targets("llama", "layers.[1].*.q_proj", "up_proj") == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert len(targets("llama")) == 14
    assert len(targets("llama", "*")) == 15  # an own head may be asked for
    assert len(targets("gpt2")) == 8


def test_loftq_is_refused_where_nothing_is_quantised() -> None:
    with pytest.raises(ValidationError, match="use kind `qlora`"):
        Lora(init="loftq")


def test_parameter_groups_spare_vectors_from_decay_and_speed_up_b(bases: dict[str, Model]) -> None:
    method = Lora(rank=2, variant="dora", lora_plus_ratio=16.0)
    module = method.attach(load_base(bases["qwen2"], method), context(bases["qwen2"]))
    groups = method.parameter_groups(module, 1e-3, 0.1)
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert {name for name, p in module.named_parameters() if p.requires_grad} == set(found)
    kinds = {name.split(".")[-3]: value for name, value in found.items()}
    assert kinds == {"lora_A": (1e-3, 0.1), "lora_B": (1.6e-2, 0.1), "lora_magnitude_vector": (1e-3, 0.0)}
    full = Full().parameter_groups(Full().attach(load_base(bases["qwen2"], Full()), context(bases["qwen2"])), 1e-3, 0.1)
    assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in full for p in group["params"])


def test_scaling_defaults() -> None:
    assert Lora(rank=16).alpha_of(16) == 32
    assert Lora(rank=16).alpha_of(4) == 8
    assert Lora(rank=16, variant="rslora").alpha_of(64) == 8
    assert Lora(rank=16, alpha=5).alpha_of(4) == 5


def test_evaluating_does_not_stop_the_gradient_of_a_quantised_model(bases: dict[str, Model]) -> None:
    method = Qlora(rank=4)
    module = method.attach(load_base(bases["llama"], method), context(bases["llama"]))
    gradients = []
    for _ in range(2):
        module.train()
        module.zero_grad()
        module(IDS, labels=IDS).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad and p.grad is not None]))
        logits(module)
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("method", [Lora(rank=4, variant="dora"), Qlora(rank=4), Qlora(rank=4, quantize=Quantization(format="int8"))])
def test_gradient_checkpointing_changes_no_gradient(method: LowRank, bases: dict[str, Model]) -> None:
    gradients = []
    for checkpointing in (False, True):
        module: Any = method.attach(load_base(bases["llama"], method), context(bases["llama"]))
        if checkpointing:
            module.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        module.train()
        module(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_other_merge_targets_are_other_models(bases: dict[str, Model]) -> None:
    method = Qlora(rank=4)
    module = method.attach(load_base(bases["llama"], method), context(bases["llama"]))
    train_some(method, module)
    trained = logits(module)
    distance = {}
    for target in ("dequantised", "original", "requantised"):
        again = method.attach(load_base(bases["llama"], method), context(bases["llama"]))
        with torch.no_grad():
            for mine, theirs in zip(again.parameters(), module.parameters(), strict=True):
                if mine.requires_grad:
                    mine.copy_(theirs)
        original = load_model(bases["llama"], None) if target == "original" else None
        distance[target] = kl(trained, logits(merge_adapter(again, target, original)))
    assert distance["dequantised"] < 1e-6
    assert distance["original"] > 100 * distance["dequantised"]
    assert distance["requantised"] > 100 * distance["dequantised"]


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "kind", "weights"])
def test_an_adapter_that_does_not_fit_is_refused(damage: str, bases: dict[str, Model], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    method = Lora(rank=2)
    method.save(method.attach(load_base(bases["llama"], method), context(bases["llama"])), tmp_path)
    tensors, config = load_file(tmp_path / "adapter_model.safetensors"), json.loads((tmp_path / "adapter_config.json").read_text())
    first = sorted(tensors)[0]
    if damage == "missing":
        del tensors[first]
    elif damage == "unexpected":
        tensors["base_model.model.other.lora_A.weight"] = tensors[first].clone()
    elif damage == "shape":
        tensors[first] = tensors[first][:1].clone()
    elif damage == "kind":
        config["peft_type"] = "IA3"
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if damage == "weights":
        (tmp_path / "adapter_model.safetensors").write_bytes(b"{}")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    message = {
        "missing": "1 tensors not in the file",
        "unexpected": "without a place in the model",
        "shape": "of another shape",
        "kind": "peft_type is `IA3`",
        "weights": "cannot read adapter_model.safetensors",
    }[damage]
    with pytest.raises(RequestError, match=message):
        method.load(load_base(bases["llama"], method), tmp_path)


def test_full_trains_everything_and_saves_what_it_has(bases: dict[str, Model], tmp_path: Path) -> None:
    method = Full()
    module = method.attach(load_base(bases["gpt2"], method), context(bases["gpt2"]))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    losses = train_some(method, module)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())
    method.save(module, tmp_path)
    assert torch.equal(logits(method.load(load_base(bases["gpt2"], method), tmp_path)), logits(module))
    assert method.merge(module) is module
