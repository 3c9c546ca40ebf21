"""What can be merged: adapters streamed into their base, runs, layers in another order; proven with transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.merge_models import family, read_values, write_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ftcli.errors import GateError, RecipeError, RequestError
from ftcli.exporting.merge_run import merge_folder
from ftcli.merging.outcome import merge_models
from ftcli.merging.search.judge import MergedModel
from ftcli.merging.sources import open_source
from ftcli.models.load import save_model
from ftcli.models.tokenizer import Tokenizer

IDS = torch.arange(2, 26)[None]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64}


def merged(folder: Path, recipe: str, name: str = "out", *, verify: bool = True) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(recipe)
    merge_models(path, folder / name, verify=verify)
    return folder / name


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return found


def llama(folder: Path, *, tie: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {**SMALL, "vocab_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": tie}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(folder)
    return model


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"]},
    "rslora with patterns": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.v_proj": 2},
        "alpha_pattern": {"v_proj": 9},
    },
    "dora": {"r": 4, "use_dora": True, "target_modules": ["k_proj", "up_proj"]},
    "embedding and a whole head": {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
}


def randomised(adapted: Any) -> Any:
    """The adapter away from its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_streamed_adapter_is_pefts_attached_one(variant: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = randomised(get_peft_model(llama(tmp_path / "base"), LoraConfig(**VARIANTS[variant])))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    out = merged(tmp_path, "merge_method: passthrough\nmodels: [base+adapter]\n")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), expected, atol=1e-3)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_on_transposed_weights_is_streamed_too(use_dora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=use_dora)
    adapted = randomised(get_peft_model(model, config))
    adapted.save_pretrained(tmp_path / "adapter")
    out = merged(tmp_path, "merge_method: passthrough\nmodels: [base+adapter]\n")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(adapted), rtol=1e-4, atol=1e-5)


def test_adapters_merge_like_the_models_they_make(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for name in ("one", "two"):
        adapted = randomised(get_peft_model(llama(tmp_path / "base"), LoraConfig(**VARIANTS["plain"], init_lora_weights=name == "one")))
        adapted.save_pretrained(tmp_path / name)
        adapted.merge_and_unload().save_pretrained(tmp_path / f"model-{name}")
    recipe = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{}]\nparameters: {{weight: 0.6}}\n"
    streamed = read_values(merged(tmp_path, recipe.format("base+one, base+two"), "streamed"))
    whole = read_values(merged(tmp_path, recipe.format("model-one, model-two"), "whole"))
    assert all(np.allclose(streamed[name], whole[name], atol=1e-6) for name in whole)


PARTED: dict[str, dict[str, Any]] = {
    "factors on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "factors on the head": {"target_modules": ["lm_head", "q_proj"]},
    "factors on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "the embedding in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "the head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def tied_base(folder: Path, tokenizer: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": tokenizer.vocab_size}, num_hidden_layers=2, tie_word_embeddings=True))
    save_model(model, tokenizer, folder)
    return model


@pytest.mark.parametrize("variant", PARTED)
def test_an_adapter_that_parts_a_tied_head_from_its_embedding_is_the_attached_one(
    variant: str, make_tokenizer: Callable[..., Tokenizer], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = randomised(get_peft_model(tied_base(tmp_path / "base", make_tokenizer()), LoraConfig(r=4, **PARTED[variant])))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), expected, atol=1e-2)
    path = tmp_path / "out.yaml"
    path.write_text("merge_method: passthrough\nmodels: [base+adapter]\n")
    outcome = merge_models(path, tmp_path / "recipe")
    merge_folder(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "folded")
    for folder in ("recipe", "folded"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
        assert loaded.config.tie_word_embeddings is False
    assert ("equal to the attached adapter", True) in [(proof.name, proof.passed) for proof in outcome.proofs]
    assert any("the head is written apart" in warning for warning in outcome.warnings)


@pytest.mark.parametrize("config", [{}, {"ensure_weight_tying": True}], ids=["equal copies", "tied by PEFT"])
def test_a_tied_head_stays_tied_where_the_adapter_keeps_both_one(
    config: dict[str, Any], make_tokenizer: Callable[..., Tokenizer], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    modules = ["embed_tokens"] if config else ["embed_tokens", "lm_head"]
    plain = tied_base(tmp_path / "base", make_tokenizer())
    adapted = randomised(get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules, **config)))
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.copy_(
            adapted.base_model.model.model.embed_tokens.modules_to_save["default"].weight
        )
    adapted.save_pretrained(tmp_path / "adapter")
    out = merged(tmp_path, "merge_method: passthrough\nmodels: [base+adapter]\n", "recipe")
    merge_folder(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "folded")
    for folder in (out, tmp_path / "folded"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(loaded), logits(adapted), rtol=1e-4, atol=1e-5)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert "lm_head.weight" not in read_values(folder)


def test_a_merge_that_is_not_the_attached_adapter_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    from ftcli.merging import adapters

    adapted = randomised(get_peft_model(llama(tmp_path / "base"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])))
    adapted.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(adapters, "scaling", lambda config, module, rank: 3.0)
    with pytest.raises(GateError, match="not the adapter's equal"):
        merged(tmp_path, "merge_method: linear\nmodels: [{model: base+adapter, parameters: {weight: 2}}]\n")
    assert not (tmp_path / "out").exists()


def test_a_tied_embedding_whose_head_has_no_known_name_is_refused(tmp_path: Path) -> None:
    values = {"odd.embed_tokens.weight": np.ones((40, 16), np.float32), "odd.layers.0.q_proj.weight": np.ones((16, 16), np.float32)}
    config = {"model_type": "odd", "tie_word_embeddings": True, "num_hidden_layers": 1}
    write_model(tmp_path / "base", values, config, dtype="F32")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2, "r": 2}))
    save_file({"base_model.model.odd.embed_tokens.weight": torch.ones(40, 16)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(RequestError, match="to which the base ties its head"):
        open_source("base+adapter", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "of kind LOHA"),
        ({"target_parameters": ["experts"]}, "factors on bare parameters"),
        ({"layer_replication": [[0, 1]]}, "repeated layers"),
        ({"alora_invocation_tokens": [1]}, "on for a part of the text only"),
    ],
)
def test_an_adapter_that_no_plain_weights_equal_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    family(tmp_path, count=0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **change}))
    with pytest.raises(RequestError, match=message):
        open_source("base+adapter", tmp_path)
    with pytest.raises(RequestError, match="holds an adapter"):
        open_source("adapter", tmp_path)


def qwen3(folder: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**SMALL, num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def gemma3(folder: Path) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SMALL, num_hidden_layers=6, sliding_window=8, layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)


@pytest.mark.parametrize("make", [qwen3, gemma3])
def test_frankenmerge_and_depth_up_scaling_load_run_and_keep_each_layers_kind(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "base")
    before = json.loads((tmp_path / "base" / "config.json").read_text())["layer_types"]
    last = len(before)
    slices = [[0, last - 1], [1, last]]
    lines = [f"  - sources: [{{model: base, layer_range: {pair}}}]\n" for pair in slices]
    franken = merged(tmp_path, "merge_method: passthrough\nslices:\n" + "".join(lines), "franken")
    scaled = merged(tmp_path, "merge_method: passthrough\ndus: {model: base, drop: 1}\n", "scaled")
    origins = [*range(last - 1), *range(1, last)]
    for folder in (franken, scaled):
        config = json.loads((folder / "config.json").read_text())
        assert config["layer_types"] == [before[layer] for layer in origins]
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.num_hidden_layers == len(origins)
        assert torch.isfinite(logits(model)).all()
        own, source = read_values(folder), read_values(tmp_path / "base")
        for layer, origin in enumerate(origins):
            name = "model.layers.{}.mlp.up_proj.weight"
            assert own[name.format(layer)].tobytes() == source[name.format(origin)].tobytes()


def test_all_layers_of_one_model_are_that_model(tmp_path: Path) -> None:
    qwen3(tmp_path / "base")
    out = merged(tmp_path, "merge_method: passthrough\nslices:\n  - sources: [{model: base, layer_range: [0, 4]}]\n")
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "base", out))
    assert torch.equal(logits(first), logits(second))
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "base" / "config.json").read_text())


def test_a_tied_model_stays_tied(tmp_path: Path) -> None:
    model = llama(tmp_path / "base", tie=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "a")
    out = merged(tmp_path, "merge_method: slerp\nbase_model: base\nmodels: [a]\nparameters: {t: [0, 1]}\n")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert "lm_head.weight" not in read_values(out)


def test_a_model_that_does_not_load_is_not_left_behind(tmp_path: Path) -> None:
    family(tmp_path, count=1)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    recipe = tmp_path / "out.yaml"
    recipe.write_text("merge_method: passthrough\nmodels: [a]\n")
    with pytest.raises(GateError, match=r"does not load|not whole"):
        merge_models(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_are_models(tmp_path: Path) -> None:
    family(tmp_path, count=1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.resolved.yaml").write_text("version: 1\nmodel: {base: builtin:tiny}\nmethod: {kind: full}\n")
    with pytest.raises(RecipeError, match="neither model/ nor adapter/"):
        merged(tmp_path, "merge_method: passthrough\nmodels: [run]\n")
    (tmp_path / "a").rename(run / "model")
    out = merged(tmp_path, "merge_method: passthrough\nmodels: [run]\n", verify=False)
    assert (out / "model.safetensors").read_bytes()[-100:] == (run / "model" / "model.safetensors").read_bytes()[-100:]
    (run / "model").rename(tmp_path / "a")
    (run / "recipe.resolved.yaml").write_text("version: 1\nmodel: {base: builtin:tiny}\nmethod: {kind: qlora}\n")
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="trained on a quantised base"):
        merged(tmp_path, "merge_method: passthrough\nmodels: [run]\n", "again")


def test_an_adapter_that_stores_its_base_does_not_change_one_that_is_shared(
    make_tokenizer: Callable[..., Tokenizer], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    from ftcli.methods.adapter import load_adapter

    base, config = tied_base(tmp_path / "base", make_tokenizer()), LoraConfig(r=4, target_modules=["embed_tokens"])
    randomised(get_peft_model(base, config)).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(fresh, tmp_path / "adapter", shares_base=True)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1
    save_file(tensors, path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(other)
    with pytest.raises(RequestError, match="the base is shared with other adapters"):
        load_adapter(other, tmp_path / "adapter", shares_base=True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), before)
    out = merged(tmp_path, "merge_method: passthrough\nmodels: [base+adapter]\n")
    merge_folder(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "folded")
    torch.testing.assert_close(*(logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (out, tmp_path / "folded")))


@pytest.mark.parametrize("family_name", ["gemma3", "gpt2"])
def test_a_tied_embedding_of_other_families_is_parted_too(family_name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any
    if family_name == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, num_hidden_layers=2, sliding_window=8, tie_word_embeddings=True))
        targets = ["embed_tokens", "q_proj"]
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=80))
        targets = ["wte"]
    model.save_pretrained(tmp_path / "base")
    adapted = randomised(get_peft_model(model, LoraConfig(r=4, target_modules=targets)))
    adapted.save_pretrained(tmp_path / "adapter")
    out = merged(tmp_path, "merge_method: passthrough\nmodels: [base+adapter]\n")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(adapted), rtol=1e-4, atol=1e-5)


def test_a_parted_model_merges_with_tied_ones(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = llama(tmp_path / "base", tie=True)
    adapted = randomised(get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens"])))
    adapted.save_pretrained(tmp_path / "adapter")
    recipe = "merge_method: linear\nmodels: [base, base+adapter]\nparameters: {weight: 1}\n"
    values, base = read_values(merged(tmp_path, recipe)), read_values(tmp_path / "base")
    whole = read_values(merged(tmp_path, "merge_method: passthrough\nmodels: [base+adapter]\n", "whole"))
    embedding = "model.embed_tokens.weight"
    np.testing.assert_array_equal(values["lm_head.weight"], base[embedding])
    np.testing.assert_allclose(values[embedding], (base[embedding] + whole[embedding]) / 2, atol=1e-6)
    assert not np.allclose(values[embedding], base[embedding], atol=1e-3)
    slices = "".join(
        f"  - sources: [{{model: {name}, layer_range: [{at}, {at + 1}]}}]\n" for at, name in enumerate(("base+adapter", "base"))
    )
    for number, donor in enumerate(("base", "base+adapter")):
        franken = read_values(merged(tmp_path, f"merge_method: passthrough\nbase_model: {donor}\nslices:\n{slices}", f"franken{number}"))
        np.testing.assert_array_equal(franken["lm_head.weight"], base[embedding])
        np.testing.assert_array_equal(franken[embedding], whole[embedding])
    # a search measures merges in a model in memory, whose head is its embedding
    frame, parted = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), open_source("base+adapter", tmp_path)
    with pytest.raises(RequestError, match=r"base\+adapter: has a head of its own"):
        MergedModel(frame, [open_source("base", tmp_path), parted], None)
