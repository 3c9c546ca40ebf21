"""Base models: loaded completely or not at all, saved so that they load again as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcli.errors import RequestError
from ftcli.models.load import load_config, load_model, save_model
from ftcli.models.quantisation import Quantization, dequantised_weight, is_quantised
from ftcli.models.settings import Init, Model
from ftcli.models.tiny import tiny_init
from ftcli.models.tokenizer import Tokenizer

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "cohere",
    "olmo2",
    "granite",
    "smollm3",
    "starcoder2",
    "stablelm",
    "qwen3_moe",
    "falcon",
    "gptj",
    "deepseek_v3",
    "gpt_oss",
    "mamba",
    "jamba",
]
IDS = torch.arange(24).reshape(2, 12) + 3


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A llama of its own with an own head."""
    model = load_model(Model(init=Init(architecture="llama", config=LLAMA)), tokenizer, seed=1)
    save_model(model, tokenizer, tmp_path / "llama")
    return tmp_path / "llama"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without(tensors: dict[str, torch.Tensor], *parts: str) -> None:
    for name in [name for name in tensors if any(part in name for part in parts)]:
        del tensors[name]


def test_saved_model_loads_with_transformers_bit_for_bit(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = load_model(Model(base=str(folder)), tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(ours), logits(theirs))
    assert AutoTokenizer.from_pretrained(folder)("abc", add_special_tokens=False)["input_ids"] == tokenizer.encode("abc")[0]
    assert ours.config.vocab_size == tokenizer.vocab_size
    assert ours.config.eos_token_id == tokenizer.eos_id


def test_weights_are_saved_in_the_dtype_they_have(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = load_model(Model(base=str(folder)), tokenizer, dtype="bfloat16")
    save_model(model, tokenizer, tmp_path / "copy")
    assert {tensor.dtype for tensor in load_file(tmp_path / "copy" / "model.safetensors").values()} == {torch.bfloat16}
    assert load_model(Model(base=str(tmp_path / "copy")), tokenizer).dtype == torch.float32
    assert torch.equal(logits(load_model(Model(base=str(tmp_path / "copy")), tokenizer, dtype="bfloat16")), logits(model))


def test_a_missing_weight_is_an_error_and_never_random(folder: Path) -> None:
    change(folder, lambda tensors: without(tensors, "up_proj", "q_proj"))
    with pytest.raises(RequestError, match=r"4 parameters are not in the checkpoint: model.layers.0.mlp.up_proj.weight, "):
        load_model(Model(base=str(folder)), None)


def test_a_weight_without_a_place_is_an_error(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({f"model.layers.7.w{i}.weight": torch.zeros(1) for i in range(12)}))
    with pytest.raises(RequestError, match=r"12 tensors of the checkpoint have no place in the model: .* and 2 more"):
        load_model(Model(base=str(folder)), None)


def test_a_weight_of_another_shape_is_an_error(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(RequestError, match=r"size mismatch|shape"):
        load_model(Model(base=str(folder)), None)


def test_an_untied_head_that_is_missing_is_an_error(folder: Path) -> None:
    change(folder, lambda tensors: without(tensors, "lm_head"))
    with pytest.raises(RequestError, match=r"1 parameters are not in the checkpoint: lm_head.weight"):
        load_model(Model(base=str(folder)), None)


def test_a_head_that_is_not_tied_stays_so_whatever_the_configuration_says(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = load_model(Model(base=str(folder)), tokenizer)
    save_model(model, tokenizer, tmp_path / "copy")
    assert torch.equal(logits(load_model(Model(base=str(tmp_path / "copy")), tokenizer)), logits(model))


def test_a_truncated_file_is_an_error(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RequestError, match="its weights"):
        load_model(Model(base=str(folder)), None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pickle files"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "is an adapter, not a model"),
        ({"notes.txt": ""}, r"found: notes.txt"),
        ({"config.json": "{", "model.safetensors": ""}, "its weights"),
        ({"config.json": '{"model_type": "lama"}', "model.safetensors": ""}, "its weights"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_is(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        load_model(Model(base=str(tmp_path)), None)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(folder: Path, tmp_path: Path, make_tokenizer: Any) -> None:
    larger = make_tokenizer(tokens=("<|im_start|>", "<|im_end|>", "<|extra|>"))
    with pytest.raises(RequestError, match="the tokenizer has 261 tokens, the embedding of the model 260 rows"):
        load_model(Model(base=str(folder)), larger)


def test_sampling_values_without_sampling_do_not_stop_saving(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
    save_model(load_model(Model(base=str(folder)), tokenizer), tokenizer, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("lama", {}, "did you mean `llama`"),
        ("llama", {"hiden_size": 32, "layers": 2}, "did you mean `hidden_size`"),
        ("llama", {"hidden_size": "wide"}, "expected int"),
        ("llama", {**LLAMA, "num_attention_heads": 5}, "model.init.config"),
    ],
)
def test_a_wrong_init_is_refused(architecture: str, config: dict[str, Any], message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=message):
        load_model(Model(init=Init(architecture=architecture, config=config)), tokenizer)


def test_random_weights_depend_on_the_seed_alone(tokenizer: Tokenizer) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = load_model(Model(init=Init(architecture="llama", config=LLAMA)), tokenizer, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.manual_seed(1)
    first = weights(4)
    assert torch.equal(first, weights(4))
    assert not torch.equal(first, weights(5))


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_quantised_model_computes_with_its_dequantised_weights(form: Any, architecture: str, tokenizer: Tokenizer) -> None:
    sizes = LLAMA if architecture == "llama" else {"n_embd": 32, "n_head": 4, "n_layer": 2}
    spec = Model(init=Init(architecture=architecture, config=sizes))
    model = load_model(spec, tokenizer, quantization=Quantization(format=form), seed=2)
    layers = {name: module for name, module in model.named_modules() if is_quantised(module)}
    assert len(layers) == (14 if architecture == "llama" else 8)
    assert not is_quantised(model.get_output_embeddings())
    for layer in layers.values():
        inputs = torch.randn(5, layer.in_features, requires_grad=True)
        weight = dequantised_weight(layer)
        for mode in (True, False):
            layer.train(mode)
            torch.testing.assert_close(layer(inputs), torch.nn.functional.linear(inputs, weight, layer.bias), rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(layer(inputs).sum(), inputs)
        torch.testing.assert_close(gradient, weight.sum(0).expand(5, -1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_tiny_model(architecture: str, tokenizer: Tokenizer) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[architecture]()
    init = tiny_init(config)
    model = load_model(Model(init=init), tokenizer)
    assert type(model.config) is type(config)
    assert model.config.num_hidden_layers == 2
    assert sum(p.numel() for p in model.parameters()) < 400_000
    assert logits(model).shape == (2, 12, tokenizer.vocab_size)
    assert load_config(Model(init=init), tokenizer).to_dict() == load_config(Model(init=tiny_init(model.config)), tokenizer).to_dict()


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K", "babyllama-361", "gpt2-mini-pd"])
def test_real_models_load_and_are_saved_bit_for_bit(name: str, shared: Path, tmp_path: Path) -> None:
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared / "models" / name))
    model = load_model(Model(base=str(shared / "models" / name)), tokenizer)
    assert logits(model).isfinite().all()
    save_model(model, tokenizer, tmp_path)
    assert torch.equal(logits(load_model(Model(base=str(tmp_path)), tokenizer)), logits(model))
