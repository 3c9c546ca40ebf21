"""What PEFT's adapter folders mean on the plain base, told from PEFT itself: starts taken off the base, Conv1D, defaults, ties."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.merge_models import read_values
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ftcli.errors import RecipeError, RequestError
from ftcli.exporting.formats.vllm import _unservable
from ftcli.exporting.merge_run import merge_folder
from ftcli.exporting.open_target import adapter_base
from ftcli.merging.lora.recipe import read_adapter_recipe
from ftcli.merging.outcome import merge_models
from ftcli.merging.sources import open_source
from ftcli.methods.adapter import load_adapter
from ftcli.models.tokenizer import Tokenizer
from ftcli.training.init_from import Origin, _take_adapter

IDS = torch.arange(20).reshape(2, 10)
Values = dict[str, torch.Tensor]


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.3, "tie_word_embeddings": False, **changes}))


def tied_llama() -> LlamaForCausalLM:
    return llama(tie_word_embeddings=True)


def gpt2() -> GPT2LMHeadModel:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, tie_word_embeddings=False))


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a PEFT adapter away from its start, on `base`; `full` is another model of its shapes."""

    def make(name: str = "adapter", make_model: Callable[[], Any] = llama, **config: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        for seed, folder in enumerate(("base", "full")):
            torch.manual_seed(seed)
            make_model().save_pretrained(tmp_path / folder)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        module = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **config}))
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        module.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def attached(adapter: Path) -> Any:
    """By PEFT alone, on the plain base."""
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter.parent / "base"), adapter).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def folded(adapter: Path) -> Values:
    values: Values = attached(adapter).merge_and_unload().state_dict()
    return values


def halved(adapter: Path, name: str = "out") -> dict[str, Any]:
    """The mean of the adapted base and of `full`."""
    folder = adapter.parent
    path = folder / f"{name}.yaml"
    path.write_text(f"merge_method: linear\nmodels: [base+{adapter.name}, full]\nparameters: {{weight: 0.5}}\n")
    merge_models(path, folder / name, verify=False)
    return read_values(folder / name)


def alone(adapter: Path, method: str, **more: Any) -> Path:
    """The only adapter of a merge, at weight 1."""
    folder = adapter.parent
    data = {"merge_method": method, "models": [str(adapter)], "base_model": str(folder / "base"), **more}
    read_adapter_recipe(data, folder).run(folder / method)
    return folder / method


def assert_means_what_peft_attaches(adapter: Path, *methods: tuple[str, dict[str, Any]]) -> None:
    expected, full = folded(adapter), read_values(adapter.parent / "full")
    plain = read_values(adapter.parent / "base")
    found = halved(adapter)
    for name in full:
        torch.testing.assert_close(torch.as_tensor(found[name]), (expected[name] + full[name]) / 2, rtol=1e-5, atol=2e-6)
    assert any(float((expected[name] - torch.as_tensor(plain[name])).abs().max()) > 0.05 for name in plain)
    for method, more in methods:
        torch.testing.assert_close(logits(attached(alone(adapter, method, **more))), logits(attached(adapter)), rtol=1e-4, atol=1e-4)


LINEAR = ["q_proj", "k_proj", "down_proj", "up_proj"]
STARTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "pissa": (llama, {"init_lora_weights": "pissa", "target_modules": LINEAR}),
    "olora": (llama, {"init_lora_weights": "olora", "target_modules": LINEAR}),
    "pissa, rslora, patterns": (
        llama,
        {
            "init_lora_weights": "pissa",
            "target_modules": LINEAR,
            "use_rslora": True,
            "rank_pattern": {"layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "pissa on conv1d": (gpt2, {"init_lora_weights": "pissa", "target_modules": ["c_attn", "attn.c_proj", "lm_head"]}),
    "no change of the base": (llama, {"init_lora_weights": "orthogonal", "target_modules": LINEAR}),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_that_peft_takes_off_the_base_is_taken_off(case: str, make_adapter: Any) -> None:
    make_model, config = STARTS[case]
    adapter = make_adapter("adapter", make_model, **config)
    ties = ("lora_ties", {"parameters": {"weight": 1.0, "energy": 1.0}})
    assert_means_what_peft_attaches(adapter, ("lora_concat", {}), ("lora_svd", {"parameters": {"energy": 1.0}}), ties)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_such_an_adapter_folds_into_its_base(
    start: str, make_adapter: Any, make_tokenizer: Callable[..., Tokenizer], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    adapter = make_adapter("adapter", lambda: llama(vocab_size=tokenizer.vocab_size), init_lora_weights=start, target_modules=LINEAR)
    tokenizer.save(tmp_path / "base")
    merge_folder(str(tmp_path / "base"), adapter, tmp_path / "folded")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded")), logits(attached(adapter)))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_dora_with_such_a_start_is_the_attached_one(start: str, make_adapter: Any) -> None:
    adapter = make_adapter(init_lora_weights=start, use_dora=True, target_modules=LINEAR)
    assert_means_what_peft_attaches(adapter, ("lora_svd", {"parameters": {"energy": 1.0}}))


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "loftq", "lora_ga", "newer_than_this"])
def test_a_start_that_cannot_be_found_again_is_refused_everywhere(start: str, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(target_modules=LINEAR)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
    refused: list[Callable[[], Any]] = [
        lambda: open_source("base+adapter", tmp_path),
        lambda: alone(adapter, "lora_concat"),
        lambda: load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter),
        lambda: adapter_base("adapter", adapter),
    ]
    for each in refused:
        with pytest.raises(RequestError, match=f"`init_lora_weights: {start}`"):
            each()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_is_not_taken_off_a_base_that_others_use(start: str, make_adapter: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapter = make_adapter(init_lora_weights=start, target_modules=LINEAR)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    with pytest.raises(RequestError, match="taken off the base, which other adapters share"):
        load_adapter(base, adapter, shares_base=True)
    assert torch.equal(logits(base), before)
    origin = Origin(adapter, adapter, "adapter", None, str(tmp_path / "base"), None)
    with pytest.raises(RequestError, match="a start that is taken off the base"):
        _take_adapter(get_peft_model(base, LoraConfig(r=4, target_modules=LINEAR)), origin)
    source: Any = SimpleNamespace(adapter=adapter, description="")
    assert any(f"`init_lora_weights: {start}`" in what for what in _unservable(source))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["c_attn", "lm_head"], ["c_attn", "c_proj", "c_fc"]])
def test_gpt2s_layers_are_transposed_and_its_head_is_not(targets: list[str], use_dora: bool, make_adapter: Any) -> None:
    adapter = make_adapter("adapter", gpt2, target_modules=targets, use_dora=use_dora)
    noted = json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert noted is ("lm_head" not in targets), "PEFT notes what the last module was"
    svd = ("lora_svd", {"parameters": {"energy": 1.0}})
    assert_means_what_peft_attaches(adapter, *([svd] if use_dora else [svd, ("lora_concat", {})]))


def test_adapters_of_one_base_merge_whatever_peft_noted_of_their_layers(make_adapter: Any, tmp_path: Path) -> None:
    folders = [make_adapter(f"a{index}", gpt2, target_modules=names) for index, names in enumerate((["c_attn"], ["c_attn", "lm_head"]))]
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    read_adapter_recipe({"merge_method": "lora_concat", "models": models}, tmp_path).run(tmp_path / "out")
    parts, found = [folded(folder) for folder in folders], folded(tmp_path / "out")
    for name in ("transformer.h.0.attn.c_attn.weight", "lm_head.weight"):
        torch.testing.assert_close(found[name], (parts[0][name] + parts[1][name]) / 2, rtol=1e-5, atol=1e-5)


def test_without_an_alpha_it_is_pefts_default(make_adapter: Any) -> None:
    adapter = make_adapter(target_modules=LINEAR)
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert_means_what_peft_attaches(adapter, ("lora_concat", {}))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=["in full", "factors"],
)
def test_a_tie_that_peft_keeps_is_kept_in_a_concatenation(config: dict[str, Any], make_adapter: Any) -> None:
    adapter = make_adapter("adapter", tied_llama, ensure_weight_tying=True, **config)
    plain = logits(AutoModelForCausalLM.from_pretrained(adapter.parent / "base"))
    expected = logits(attached(adapter))
    assert float((expected - plain).abs().max()) > 0.5
    torch.testing.assert_close(logits(attached(alone(adapter, "lora_concat"))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [300, 5000])
@pytest.mark.parametrize("method", ["linear", "lora_concat"])
def test_a_name_that_is_too_long_for_a_file_is_no_model(method: str, length: int, tmp_path: Path) -> None:
    path, name = tmp_path / "r.yaml", "a" * length
    path.write_text(f"merge_method: {method}\nmodels: [{{model: {name}, parameters: {{weight: 1}}}}]\n")
    with pytest.raises(RequestError, match=name):
        merge_models(path, tmp_path / "out") if method == "linear" else read_adapter_recipe(
            {"merge_method": method, "models": [name]}, tmp_path
        )


def test_modules_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodules: {}\n")
    with pytest.raises(RecipeError, match="there are no models"):
        merge_models(tmp_path / "r.yaml", tmp_path / "out")
