"""Adapters merged into an adapter, and adapters made of models: the identities of the algebra, and where PEFT differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ftcli.errors import RecipeError, RequestError
from ftcli.merging.lora.adapter import open_adapter
from ftcli.merging.lora.extract import Extraction, extract_lora
from ftcli.merging.lora.factor import factored, joined, truncated
from ftcli.merging.lora.merge import AdapterMerge, merge_adapters
from ftcli.merging.lora.recipe import read_adapter_recipe
from ftcli.merging.lora.stored import stored_model

IDS = torch.arange(20).reshape(2, 10)
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def arrays(seed: int, m: int, n: int, r: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((r, n), np.float32), generator.standard_normal((m, r), np.float32)


@given(
    st.integers(0, 99),
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(1, 5), st.floats(-2, 2)), min_size=1, max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_joined_factors_are_the_weighted_sum(seed: int, m: int, n: int, parts: list[tuple[int, float]]) -> None:
    factors = [arrays(seed + index, m, n, r) for index, (r, _) in enumerate(parts)]
    weights = [weight for _, weight in parts]
    expected = sum(weight * b.astype(np.float64) @ a for (a, b), weight in zip(factors, weights, strict=True))
    a, b = joined(factors, weights)
    assert len(a) == max(1, sum(r for r, weight in parts if weight != 0)) or not any(weights)
    np.testing.assert_allclose(b.astype(np.float64) @ a, expected, atol=2e-5)


@given(st.integers(0, 99), st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_truncation_by_qr_is_that_of_the_full_svd(seed: int, m: int, n: int, r: int, kept: int) -> None:
    a, b = arrays(seed, m, n, r)
    product = b.astype(np.float64) @ a
    values = np.linalg.svd(product, compute_uv=False)
    result = truncated(a, b, kept, None)
    error = np.linalg.norm(result.b.astype(np.float64) @ result.a - product)
    best = np.sqrt(np.sum(values[kept:] ** 2))
    assert error <= best + 1e-4 * values[0]
    assert result.energy == pytest.approx(1 - best**2 / np.sum(values**2), abs=1e-6)
    if kept >= min(r, m, n):
        assert error <= 1e-5 * values[0] + 1e-6


@pytest.mark.parametrize("shape", [(60, 40), (900, 1000)])
def test_a_dense_change_is_factored_to_the_energy_asked_for(shape: tuple[int, int]) -> None:
    a, b = arrays(1, *shape, 12)
    matrix = b @ a
    full = factored(matrix, 12, None)
    assert np.linalg.norm(full.b @ full.a - matrix) < 1e-5 * np.linalg.norm(matrix)
    part = factored(matrix, None, 0.8)
    assert 0.8 <= part.energy < 0.95
    assert part.rank < 12
    assert factored(np.zeros((5, 3), np.float32), None, 0.9).rank == 1


def make_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.3, "tie_word_embeddings": False, **changes})).eval()


def make_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)).eval()


def disturb(model: Any, seed: int, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a PEFT adapter with random factors, on a base that is saved once beside it."""

    def make(name: str, seed: int, base: Callable[[], Any] = make_llama, **config: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        if not (tmp_path / "base").is_dir():
            base().save_pretrained(tmp_path / "base")
        model = base()
        model.name_or_path = str(tmp_path / "base")
        module = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**PLAIN, **config}))
        disturb(module, seed)
        module.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def merged_weights(folder: Path, base: Callable[[], Any] = make_llama) -> dict[str, torch.Tensor]:
    """The base's weights with the adapter folded in, by PEFT."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base(), folder).merge_and_unload()
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def dense_truth(folders: list[Path], weights: list[float], base: Callable[[], Any] = make_llama) -> dict[str, torch.Tensor]:
    """base + sum of weight * (merged - base), tensor by tensor."""
    plain = {name: tensor.double() for name, tensor in base().state_dict().items()}
    parts = [merged_weights(folder, base) for folder in folders]
    return {name: tensor + sum(w * (part[name] - tensor) for w, part in zip(weights, parts, strict=True)) for name, tensor in plain.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(tensor.abs().max()))
        assert float((found[name] - tensor).abs().max()) <= tolerance * scale, name


def run(method: str, folders: list[Path], weights: list[float], output: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(folder), "parameters": {"weight": weight}} for folder, weight in zip(folders, weights, strict=True)]
    return read_adapter_recipe({"merge_method": method, "models": models, **more}, output.parent).run(output)


CASES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "plain": (make_llama, [{}, {}]),
    "rslora": (make_llama, [{"use_rslora": True}, {"use_rslora": True, "r": 2}]),
    "patterns": (make_llama, [{"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 11}}, {"r": 3}]),
    "different targets": (make_llama, [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "up_proj"], "r": 1}]),
    "conv1d": (make_gpt2, [{"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}] * 2),
    "embedding": (make_llama, [{"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"]}]),
    "whole modules": (make_llama, [{"modules_to_save": ["lm_head", "norm"]}, {"modules_to_save": ["norm"]}]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -0.7]])
def test_concatenation_is_the_weighted_sum_of_true_changes(case: str, weights: list[float], make_adapter: Any, tmp_path: Path) -> None:
    base, configs = CASES[case]
    folders = [make_adapter(f"a{index}", index, base, **config) for index, config in enumerate(configs)]
    report = run("lora_concat", folders, weights, tmp_path / "out")
    assert report["energy"] == 1.0
    assert_same(merged_weights(tmp_path / "out", base), dense_truth(folders, weights, base))


@pytest.mark.parametrize("case", [name for name in CASES if name != "different targets"])
def test_one_adapter_of_weight_one_is_itself(case: str, make_adapter: Any, tmp_path: Path) -> None:
    base, configs = CASES[case]
    folder = make_adapter("a0", 0, base, **configs[0])
    for method in ("lora_concat", "lora_svd", "lora_ties", "lora_dare_linear", "lora_task_arithmetic"):
        run(method, [folder], [1.0], tmp_path / method, base_model=str(tmp_path / "base"))
        assert_same(merged_weights(tmp_path / method, base), merged_weights(folder, base))


def test_low_rank_svd_of_all_ranks_is_exact_and_reports_what_fewer_lose(make_adapter: Any, tmp_path: Path) -> None:
    folders = [make_adapter(f"a{index}", index, r=rank) for index, rank in enumerate((2, 4))]
    whole = run("lora_svd", folders, [0.5, -1.5], tmp_path / "whole", parameters={"rank": 6})
    assert whole["error"] < 1e-5
    assert_same(merged_weights(tmp_path / "whole"), dense_truth(folders, [0.5, -1.5]))
    part = run("lora_svd", folders, [0.5, -1.5], tmp_path / "part", parameters={"energy": 0.9})
    assert 0.9 <= part["energy"] < 1
    truth, found, plain = dense_truth(folders, [0.5, -1.5]), merged_weights(tmp_path / "part"), make_llama().state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    lost = ((found[name] - truth[name]) ** 2).sum() / ((truth[name] - plain[name]) ** 2).sum()
    reported = next(module for module in part["modules"] if module["name"] == name.removesuffix(".weight"))
    assert float(lost) == pytest.approx(1 - reported["energy"], abs=1e-5)


@pytest.mark.parametrize("method", ["lora_ties", "lora_dare_ties", "lora_della", "lora_breadcrumbs"])
def test_a_merge_of_changes_is_that_of_the_dense_models(method: str, make_adapter: Any, tmp_path: Path) -> None:
    from ftcli.merging.methods.registry import METHODS
    from ftcli.merging.pieces import ArrayInputs
    from ftcli.merging.randomness import Randomness

    folders = [make_adapter(f"a{index}", index) for index in range(2)]
    given: dict[str, Any] = {"density": 0.6}
    run(method, folders, [0.6, 0.4], tmp_path / "out", parameters={**given, "energy": 1.0})
    dense = METHODS[method.removeprefix("lora_")]
    plain, parts = make_llama().state_dict(), [merged_weights(folder) for folder in folders]
    found = merged_weights(tmp_path / "out")
    defaults = {parameter.name: (parameter.default,) * 2 if parameter.per_model else parameter.default for parameter in dense.parameters}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        deltas = [(part[name] - plain[name].double()).float().numpy() for part in parts]
        names = tuple(str(folder) for folder in folders)
        inputs = ArrayInputs(deltas, np.zeros_like(deltas[0]), Randomness(0, name.removesuffix(".weight"), names))
        function = dense.merge(inputs, {**defaults, "weight": (0.6, 0.4), "density": (0.6, 0.6)})
        expected = np.concatenate([function(piece) for piece in inputs.pieces()])
        change = (found[name] - plain[name].double()).numpy()
        assert np.abs(change).max() > 0
        # values that tie at a threshold may round to either side of it
        assert np.mean(np.abs(change - expected) > 1e-5) < 0.02


def test_dora_goes_through_its_true_change(make_adapter: Any, tmp_path: Path) -> None:
    folders = [make_adapter("a0", 0, use_dora=True), make_adapter("a1", 1)]
    with pytest.raises(RequestError, match=r"DoRA(.|\n)*lora_svd"):
        run("lora_concat", folders, [0.5, 0.5], tmp_path / "no")
    assert not (tmp_path / "no").exists()
    run("lora_svd", folders, [0.5, 0.5], tmp_path / "out", parameters={"energy": 1.0})
    assert_same(merged_weights(tmp_path / "out"), dense_truth(folders, [0.5, 0.5]))


def peft_merge(folders: list[Path], weights: list[float], combination: str) -> dict[str, torch.Tensor]:
    """What PEFT's `add_weighted_adapter` makes of them, folded in."""
    from peft import PeftModel

    names = [f"m{index}" for index in range(len(folders))]
    model = PeftModel.from_pretrained(make_llama(), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.add_weighted_adapter(names, weights, "merged", combination_type=combination, svd_rank=8 if combination == "svd" else None)
    model.set_adapter("merged")
    merged = model.merge_and_unload(adapter_names=["merged"])
    return {name: tensor.double() for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_peft_agrees_where_it_is_right(combination: str, make_adapter: Any, tmp_path: Path) -> None:
    folders = [make_adapter(f"a{index}", index) for index in range(2)]
    theirs = peft_merge(folders, [0.6, 0.4], combination)
    run("lora_concat", folders, [0.6, 0.4], tmp_path / "cat")
    run("lora_svd", folders, [0.6, 0.4], tmp_path / "svd", parameters={"rank": 8})
    assert_same(merged_weights(tmp_path / "cat"), theirs)
    assert_same(merged_weights(tmp_path / "svd"), theirs)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"use_rslora": True}, "lora_concat"),
        ({"use_dora": True}, "lora_svd"),
        ({"alpha_pattern": {"q_proj": 30}, "use_rslora": True}, "lora_svd"),
    ],
)
def test_the_dense_truth_holds_where_peft_is_wrong(config: dict[str, Any], method: str, make_adapter: Any, tmp_path: Path) -> None:
    folders = [make_adapter(f"a{index}", index, **config) for index in range(2)]
    truth, name = dense_truth(folders, [0.6, 0.4]), "model.layers.0.self_attn.q_proj.weight"
    more = {} if method == "lora_concat" else {"parameters": {"energy": 1.0}}
    run(method, folders, [0.6, 0.4], tmp_path / "out", **more)
    assert_same(merged_weights(tmp_path / "out"), truth)
    change = truth[name] - make_llama().state_dict()[name].double()
    theirs = (peft_merge(folders, [0.6, 0.4], "cat")[name] - truth[name]).norm() / change.norm()
    assert float(theirs) > 0.1


def test_whole_modules_are_averaged_where_peft_refuses(make_adapter: Any, tmp_path: Path) -> None:
    folders = [make_adapter(f"a{index}", index, modules_to_save=["lm_head"]) for index in range(2)]
    with pytest.raises(ValueError, match="modules_to_save"):
        peft_merge(folders, [0.5, 0.5], "cat")
    run("lora_concat", folders, [0.5, 0.5], tmp_path / "out")
    heads = [load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"] for folder in folders]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    torch.testing.assert_close(found, (heads[0] + heads[1]) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "lora_tise"}, "did you mean `lora_ties`"),
        ({"modles": []}, "did you mean `models`"),
        ({"parameters": {"rnak": 3}}, "did you mean `rank`"),
        ({"parameters": {"rank": 0}}, "at least 1"),
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
        ({"models": []}, "there are no adapters"),
        ({"merge_method": "lora_model_stock"}, "at least 2 adapters"),
        ({"models": [{"model": "nowhere/at/all"}]}, "is no folder"),
    ],
)
def test_a_wrong_recipe_is_refused(changes: dict[str, Any], message: str, make_adapter: Any, tmp_path: Path) -> None:
    folder = make_adapter("a0", 0)
    data = {"merge_method": "lora_svd", "models": [str(folder)], **changes}
    with pytest.raises(RequestError, match=message):
        read_adapter_recipe(data, tmp_path)


@pytest.mark.parametrize("method", ["lora_concat", "lora_svd", "lora_task_arithmetic"])
def test_a_merge_in_which_no_adapter_counts_is_refused(method: str, make_adapter: Any, tmp_path: Path) -> None:
    models = [{"model": str(make_adapter("a0", 0)), "parameters": {"weight": 0}}]
    with pytest.raises(RequestError, match="the weights are all 0"):
        read_adapter_recipe({"merge_method": method, "models": models}, tmp_path)


def test_adapters_that_do_not_fit_are_refused_before_anything_is_written(make_adapter: Any, tmp_path: Path) -> None:
    first = make_adapter("a0", 0)
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((first / "adapter_config.json").read_text())
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): torch.ones(2, 9), name.format("B"): torch.ones(16, 2)}, other / "adapter_model.safetensors")
    for changes, message in [
        ({}, r"\(16, 9\)"),
        ({"base_model_name_or_path": "elsewhere"}, "different bases"),
        ({"bias": "all"}, "trains biases"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"peft_type": "LOHA"}, "`loha` adapter"),
    ]:
        (other / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(RequestError, match=message):
            run("lora_concat", [first, other], [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", [make_llama, make_gpt2, lambda: make_llama(tie_word_embeddings=True)])
def test_the_adapter_of_a_merged_model_is_the_adapter(base: Any, make_adapter: Any, tmp_path: Path) -> None:
    from ftcli.exporting.extract_lora import anatomy

    targets = ["c_attn", "c_proj"] if base is make_gpt2 else ["q_proj", "down_proj"]
    folder = make_adapter("a0", 0, base, target_modules=targets, fan_in_fan_out=base is make_gpt2)
    from peft import PeftModel

    PeftModel.from_pretrained(base(), folder).merge_and_unload().save_pretrained(tmp_path / "tuned")
    extraction = Extraction(stored_model(tmp_path / "tuned"), stored_model(tmp_path / "base"), anatomy(tmp_path / "base"), rank=4)
    report = extract_lora(extraction, tmp_path / "out", base=str(tmp_path / "base"), inputs={})
    assert report.energy > 1 - 1e-6
    assert report.full_modules == ()
    original, found = open_adapter("a0", folder), open_adapter("out", tmp_path / "out")
    assert found.modules.keys() == original.modules.keys()
    for module in original.modules:
        expected = original.delta(module, None)
        assert np.linalg.norm(found.delta(module, None) - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("tied", [True, False])
def test_what_no_factors_can_change_is_kept_whole(tied: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    from ftcli.exporting.extract_lora import anatomy

    def base() -> Any:
        return make_llama(tie_word_embeddings=tied)

    base().save_pretrained(tmp_path / "base")
    tuned = base()
    disturb(tuned, 3, 0.05)
    tuned.save_pretrained(tmp_path / "tuned")
    extraction = Extraction(stored_model(tmp_path / "tuned"), stored_model(tmp_path / "base"), anatomy(tmp_path / "base"), energy=1.0)
    report = extract_lora(extraction, tmp_path / "out", base=str(tmp_path / "base"), inputs={})
    assert {"model.norm", "model.embed_tokens"} <= set(report.full_modules)
    assert ("lm_head" in report.full_modules) == tied
    with torch.no_grad():
        found = PeftModel.from_pretrained(base(), tmp_path / "out")(IDS).logits
        torch.testing.assert_close(found, tuned(IDS).logits, atol=1e-3, rtol=1e-4)


def test_models_that_differ_in_more_than_numbers_are_refused(tmp_path: Path) -> None:
    from ftcli.exporting.extract_lora import anatomy

    make_llama().save_pretrained(tmp_path / "base")
    make_llama(vocab_size=42).save_pretrained(tmp_path / "tuned")
    extraction = Extraction(stored_model(tmp_path / "tuned"), stored_model(tmp_path / "base"), anatomy(tmp_path / "base"), rank=2)
    with pytest.raises(RequestError, match=r"\(42, 16\)(.|\n)*same vocabulary"):
        extract_lora(extraction, tmp_path / "out", base="b", inputs={})
    same = Extraction(stored_model(tmp_path / "base"), stored_model(tmp_path / "base"), anatomy(tmp_path / "base"), rank=2)
    with pytest.raises(RequestError, match="the same weights"):
        extract_lora(same, tmp_path / "out", base="b", inputs={})


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        (lambda: make_llama(num_hidden_layers=4), r"model.layers.2.input_layernorm.weight: is in the tuned model only, and so are 17 more"),
        (lambda: make_llama(num_hidden_layers=1), r"is not in the tuned model's weights"),
        (lambda: make_llama(intermediate_size=32), r"has shape \(32, 16\) in the tuned model, \(24, 16\) in the base"),
    ],
    ids=["deeper", "shallower", "wider"],
)
def test_models_of_other_depths_and_shapes_are_refused(tuned: Callable[[], Any], message: str, tmp_path: Path) -> None:
    from ftcli.exporting.extract_lora import extract

    make_llama().save_pretrained(tmp_path / "base")
    tuned().save_pretrained(tmp_path / "tuned")
    with pytest.raises(RequestError, match=message):
        extract(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_what_changes_beside_the_language_model_is_not_dropped(tmp_path: Path) -> None:
    from ftcli.exporting.extract_lora import anatomy

    for name, value in (("base", 0.0), ("same", 0.0), ("tuned", 1.0)):
        make_llama().save_pretrained(tmp_path / name)
        disturbed = load_file(tmp_path / name / "model.safetensors")
        disturbed["model.norm.weight"] += 0.0 if name == "base" else 0.5
        save_file({**disturbed, "vision.weight": torch.full((2, 2), value)}, tmp_path / name / "model.safetensors", {"format": "pt"})
    base = stored_model(tmp_path / "base")
    Extraction(stored_model(tmp_path / "same"), base, anatomy(tmp_path / "base"), rank=2).check()
    with pytest.raises(RequestError, match=r"vision.weight: differs, and is no parameter"):
        Extraction(stored_model(tmp_path / "tuned"), base, anatomy(tmp_path / "base"), rank=2).check()


@pytest.fixture
def make_other(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of an adapter of another kind than LoRA."""

    def make(name: str, seed: int, kind: str = "ia3", **config: Any) -> Path:
        from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model

        configs: dict[str, Any] = {
            "ia3": lambda: IA3Config(
                task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **config
            ),
            "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", **{"num_virtual_tokens": 3, **config}),
            "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", **{"num_virtual_tokens": 3, **config}),
        }
        module = get_peft_model(make_llama(), configs[kind]())
        disturb(module, seed)
        module.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("kind", ["ia3", "prompt", "prefix"])
def test_other_kinds_are_averaged_parameter_by_parameter(kind: str, make_other: Any, tmp_path: Path) -> None:
    folders = [make_other(f"a{index}", index, kind) for index in range(3)]
    parts = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    run("adapter_average", folders, [2, 1, 1], tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.5 * parts[0][name] + 0.25 * parts[1][name] + 0.25 * parts[2][name])
    run("adapter_average", [folders[0]] * 3, [0.2, 0.5, 0.3], tmp_path / "same")
    torch.testing.assert_close(load_file(tmp_path / "same" / "adapter_model.safetensors"), parts[0])
    run("adapter_average", folders[1:], [1, 0], tmp_path / "one")
    assert all(torch.equal(tensor, parts[1][name]) for name, tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").items())
    reordered = run("adapter_average", [folders[2], folders[0], folders[1]], [1, 2, 1], tmp_path / "reordered")
    assert reordered["kind"] in ("ia3", "prompt_tuning", "prefix_tuning")
    torch.testing.assert_close(load_file(tmp_path / "reordered" / "adapter_model.safetensors"), found)


def test_bottleneck_adapters_are_averaged_and_load_again(tmp_path: Path) -> None:
    from ftcli.methods.bottleneck_adapter import BottleneckAdapter
    from ftcli.methods.context import AttachContext

    method = BottleneckAdapter(preset="pfeiffer")
    for index in range(2):
        module = method.attach(make_llama(), AttachContext(seed=index))
        disturb(module, index)
        method.save(module, tmp_path / f"b{index}")
    folders = [tmp_path / "b0", tmp_path / "b1"]
    assert run("adapter_average", folders, [1, 3], tmp_path / "out", base_model="base")["kind"] == "bottleneck"
    parts = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.25 * parts[0][name] + 0.75 * parts[1][name])
    run("adapter_average", [folders[0]] * 2, [1, 1], tmp_path / "same", base_model="base")
    with torch.no_grad():
        logits = [method.load(make_llama(), folder)(IDS).logits for folder in (folders[0], tmp_path / "same")]
    torch.testing.assert_close(logits[0], logits[1])


def test_scales_average_by_their_logarithms_where_asked_for(make_other: Any, tmp_path: Path) -> None:
    folders = [make_other(f"a{index}", index) for index in range(2)]
    run("adapter_average", folders, [1, 1], tmp_path / "out", parameters={"scale": "log"})
    parts = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, (parts[0][name] * parts[1][name]).sqrt())


def test_adapters_without_an_average_are_refused(make_other: Any, make_adapter: Any, tmp_path: Path) -> None:
    ia3, short, lora = make_other("ia3", 0), make_other("short", 0, "prompt"), make_adapter("lora", 0)
    longer = make_other("longer", 1, "prompt", num_virtual_tokens=5)
    for folders, message in [
        ([ia3, short], "is `prompt_tuning`"),
        ([short, longer], "num_virtual_tokens: 5"),
        ([lora, lora], "lora_concat"),
    ]:
        with pytest.raises(RequestError, match=message):
            run("adapter_average", folders, [0.5, 0.5], tmp_path / "out", base_model=str(tmp_path / "base"))
    with pytest.raises(RequestError, match="sum to 0"):
        run("adapter_average", [ia3, ia3], [1, -1], tmp_path / "out")


def test_a_merge_can_be_made_without_a_recipe(make_adapter: Any, tmp_path: Path) -> None:
    adapters = tuple(open_adapter(f"a{index}", make_adapter(f"a{index}", index)) for index in range(2))
    report = merge_adapters(AdapterMerge("lora_concat", adapters, {"weight": (0.5, 0.5)}, None), tmp_path / "out")
    assert report.error < 1e-5
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["inputs"]) == 4
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(RecipeError):
        read_adapter_recipe({"merge_method": "lora_ties", "models": [str(tmp_path / "a0")]}, tmp_path)
