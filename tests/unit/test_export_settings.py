"""GGUF: what a file cannot say is refused by its name, and what a file does not say is not taken from elsewhere when it is read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftcli.errors import GateError, RequestError
from ftcli.exporting.difference import logits_on
from ftcli.exporting.export import export
from ftcli.exporting.formats.format import Subject
from ftcli.exporting.formats.gguf import Gguf
from ftcli.exporting.gguf import settings
from ftcli.models.load import load_model, save_model
from ftcli.models.settings import Init, Model
from ftcli.models.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.2}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512}
GEMMA2 = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 128}
GEMMA2 |= {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA3 = {**GEMMA2, "layer_types": ["sliding_attention", "sliding_attention"]}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512, "initializer_range": 0.2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.fixture
def make_model(make_tokenizer: Callable[..., Tokenizer], tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a tiny model with weights that make every setting count."""

    def make(architecture: str, config: dict[str, Any], tokenizer: Tokenizer | None = None) -> Path:
        tokenizer = tokenizer or make_tokenizer()
        folder = tmp_path / "model"
        save_model(load_model(Model(init=Init(architecture=architecture, config=config)), tokenizer, seed=1), tokenizer, folder)
        return folder

    return make


def exported(folder: Path, dtype: str = "q8_0") -> Any:
    return export([str(folder)], Gguf(dtype), folder.parent / f"out-{dtype}")


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", {**GROUPED, "hidden_act": "gelu"}, r"`hidden_act: gelu` \(it is `silu` in the runtime\)"),
        ("llama", {**GROUPED, "is_causal": False}, r"`is_causal: False`"),
        (
            "llama",
            {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "`partial_rot",
        ),
        ("gpt2", {**GPT2, "activation_function": "relu"}, "`activation_function: relu`"),
        ("gpt2", {**GPT2, "scale_attn_weights": False}, "`scale_attn_weights: False`"),
        ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}, "`scale_attn_by_inverse_layer_idx: True`"),
        ("gemma2", {**GEMMA2, "attn_logit_softcapping": None}, r"`attn_logit_softcapping: None` \(the runtime divides by it\)"),
        ("gemma2", {**GEMMA2, "tie_word_embeddings": False}, "`tie_word_embeddings: False`"),
        ("gemma3_text", {**GEMMA3, "final_logit_softcapping": 30.0}, r"`final_logit_softcapping: 30\.0`"),
        ("qwen2", {**GROUPED, "rope_parameters": LLAMA3}, "RoPE of type `llama3`"),
        ("qwen3", {**GROUPED, "head_dim": 16, "attention_bias": True}, "`attention_bias: True`"),
    ],
)
def test_a_setting_that_the_file_cannot_say_is_refused_by_its_name(
    architecture: str, config: dict[str, Any], message: str, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(architecture, {key: value for key, value in config.items() if key != "is_causal"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    monkeypatch.setattr("ftcli.models.load.load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(RequestError, match=message):
        exported(folder)


def test_every_setting_of_every_family_is_known() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for kind in settings.SAID:
        known = settings.SAID[kind] | settings.FIXED[kind].keys() | settings._BY_OTHERS | settings._WITHOUT_EFFECT
        assert {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])} - known - {"is_encoder_decoder"} == set(), kind


def test_a_setting_that_came_later_is_refused_unless_it_says_nothing() -> None:
    from transformers import LlamaConfig

    @dataclasses.dataclass
    class Later(LlamaConfig):
        logit_scale: float = 1.0

    Later.__module__ = LlamaConfig.__module__
    assert settings.problems_of(Later()) == []
    assert settings.problems_of(Later(logit_scale=0.5)) == ["`logit_scale: 0.5`"]
    Later.__module__ = "modeling_custom"
    assert settings.problems_of(Later()) == ["code of its own (`Later`)"]


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_0"])
def test_what_the_file_does_not_say_is_not_taken_from_the_source(kind: str, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("llama", {**GROUPED, "hidden_act": "gelu"})
    monkeypatch.setattr("ftcli.exporting.gguf.families.problems_of", lambda config: [])
    with pytest.raises(GateError, match="a setting is lost"):
        exported(folder, kind)
    assert not (folder.parent / f"out-{kind}").exists()


@pytest.mark.parametrize(
    ("architecture", "config", "call"),
    [
        ("gemma2", GEMMA2, "add_attn_logit_softcapping"),
        ("gemma3_text", GEMMA3, "add_sliding_window"),
        ("llama", {**GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "add_rope_scaling_factor"),
        ("gpt2", {**GPT2, "layer_norm_epsilon": 0.5}, "add_layer_norm_eps"),
    ],
)
def test_a_wrong_number_in_the_file_is_found_without_llama_cpp(
    architecture: str, config: dict[str, Any], call: str, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    folder, write = make_model(architecture, config), getattr(GGUFWriter, call)
    monkeypatch.setattr(GGUFWriter, call, lambda self, number: write(self, number // 8 or 1e-3))
    with pytest.raises(GateError, match=r"loaded by transformers .*a setting is lost"):
        exported(folder)


def test_the_context_ends_at_the_window_that_the_runtime_has_not(make_model: Any) -> None:
    config = {**GROUPED, "sliding_window": 16}
    report = exported(make_model("mistral", config), "f32")
    check = next(check for check in report.checks if "transformers" in check.name)
    assert check.passed
    assert check.difference.kl < 1e-9
    assert settings.config_in(next(Path(report.output).glob("*.gguf"))).max_position_embeddings == 16


def test_the_factors_of_a_llama3_rope_are_read_from_the_file(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.exporting.gguf import families

    folder = make_model("llama", {**GROUPED, "rope_parameters": LLAMA3})
    report = exported(folder, "f32")
    assert "the factors of RoPE" in next(check.detail for check in report.checks if "transformers" in check.name)
    true_factors = families.rope_factors
    monkeypatch.setattr(families, "rope_factors", lambda model: true_factors(model) * 2)
    with pytest.raises(GateError, match="a setting is lost"):
        exported(folder, "f16")


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q5_1", "q4_0"])
def test_a_lost_scale_is_no_rounding(kind: str, make_model: Any, tmp_path: Path) -> None:
    from ftcli.exporting.gguf.file import write_gguf
    from ftcli.exporting.gguf.read_back import by_transformers

    folder = make_model("llama", GROUPED)
    tokenizer = load_tokenizer(str(folder))
    model = load_model(Model(base=str(folder)), tokenizer, dtype="float32")
    probe = [tokenizer.encode("The quick brown fox jumps over the lazy dog.")[0]]
    source: Any = SimpleNamespace(probe=probe, device="cpu")
    expected, path = logits_on(model, probe), tmp_path / "out.gguf"
    write_gguf(model, tokenizer, path, kind, "model")
    assert by_transformers(Subject(source, model, expected), path, kind).passed
    for name, parameter in model.named_parameters():
        if "_proj" in name:  # 8-bit integers, and no scale
            parameter.data = (parameter.data / parameter.data.abs().amax(1, keepdim=True) * 127).round()
    write_gguf(model, tokenizer, path, kind, "model")
    check = by_transformers(Subject(source, model, expected), path, kind)
    assert check.passed is False
    assert "not what the source computes with" in check.detail


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q5_1", "q4_0"])
def test_more_than_rounding_is_found(kind: str, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.exporting.gguf import read_back

    folder = make_model("llama", GROUPED)
    monkeypatch.setattr(read_back, "_wrong_tensors", lambda *_: [])
    whole = read_back._load

    def load_with_one_wrong_channel(path: Path) -> Any:
        unread, loaded = whole(path)
        loaded.model.norm.weight.data[:4] *= -8  # few numbers, and much of what is computed
        return unread, loaded

    monkeypatch.setattr(read_back, "_load", load_with_one_wrong_channel)
    with pytest.raises(GateError, match="no rounding"):
        exported(folder, kind)


def test_more_stop_tokens_than_places_are_refused(make_model: Any) -> None:
    folder = make_model("llama", GROUPED)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5, 6, 7]}))
    with pytest.raises(RequestError, match="places for 2 tokens beside EOS"):
        exported(folder)


def pieces(folder: Path, *normalizer: Any) -> Tokenizer:
    """A SentencePiece-like BPE that does something to a text before it is cut."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    letters += ["th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(letters)}, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([*normalizer, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    return load_tokenizer(str(folder))


def test_a_tokenizer_that_changes_letters_is_refused(tmp_path: Path) -> None:
    from tokenizers import normalizers

    from ftcli.exporting.gguf.vocabulary import vocabulary_of

    assert vocabulary_of(pieces(tmp_path / "plain"), 0).model == "llama"
    with pytest.raises(RequestError, match=r"other pieces of .Hello world"):
        vocabulary_of(pieces(tmp_path / "lower", normalizers.Lowercase()), 0)
