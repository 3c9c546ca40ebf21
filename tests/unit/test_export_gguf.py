"""`ftcli export --to gguf`: every family reads back as it was, by transformers and, where it is installed, by llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcli.errors import GateError, MissingExtraError, RequestError, RunError
from ftcli.exporting.export import ExportReport, export
from ftcli.exporting.formats.gguf import Gguf
from ftcli.models.load import load_model, save_model
from ftcli.models.settings import Init, Model
from ftcli.models.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.2}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "llama with other frequencies": {**GROUPED, "rope_parameters": LLAMA3},
    "llama with linear RoPE": {**GROUPED, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama with wide heads": {**GROUPED, "head_dim": 32, "tie_word_embeddings": True},
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 32},
    "gemma2": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "sliding_attention"]},
    "phi3": {**GROUPED, "pad_token_id": None},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512, "initializer_range": 0.2},
}


@pytest.fixture
def make_model(make_tokenizer: Callable[..., Tokenizer], tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a tiny model whose norms and biases are not at their start."""

    def make(architecture: str, config: dict[str, Any], tokenizer: Tokenizer | None = None) -> Path:
        tokenizer = tokenizer or make_tokenizer()
        model = load_model(Model(init=Init(architecture=architecture, config=config)), tokenizer, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        folder = tmp_path / "model"
        save_model(model, tokenizer, folder)
        return folder

    return make


def exported(folder: Path, dtype: str = "f32") -> ExportReport:
    return export([str(folder)], Gguf(dtype), folder.parent / f"out-{dtype}")


def found(report: ExportReport, runtime: str) -> Any:
    check = next(check for check in report.checks if runtime in check.name)
    if check.passed is None:
        pytest.skip(check.detail)
    return check


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_back_what_was_written(family: str, make_model: Any) -> None:
    report = exported(make_model(family.split()[0], FAMILIES[family]))
    check = found(report, "transformers")
    assert check.passed
    assert check.difference.kl < 1e-6
    if family == "llama":
        assert check.detail == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(family: str, make_model: Any) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    check = found(exported(make_model(family.split()[0], FAMILIES[family])), "llama.cpp")
    assert check.passed
    assert check.difference.kl < 1e-5
    assert check.detail == "cuts text alike"


def test_rounding_grows_as_bits_go(make_model: Any) -> None:
    folder = make_model("llama", GROUPED)
    kinds = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
    reports = {kind: exported(folder, kind) for kind in kinds}
    distance = {kind: found(report, "transformers").difference.kl for kind, report in reports.items()}
    assert distance["f32"] < distance["f16"] < distance["bf16"] < distance["q8_0"] < distance["q5_0"] < distance["q4_0"] < 1
    assert reports["q4_0"].num_bytes < reports["q8_0"].num_bytes < reports["f16"].num_bytes < reports["f32"].num_bytes


def test_rows_that_are_no_whole_blocks_stay_16_bit(make_model: Any) -> None:
    from gguf import GGUFReader

    folder = make_model("llama", {**GROUPED, "intermediate_size": 80})
    exported(folder, "q4_0")
    path = next((folder.parent / "out-q4_0").glob("*.gguf"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


def test_the_file_says_how_to_talk_and_when_to_stop(make_model: Any) -> None:
    from gguf import GGUFReader

    folder = make_model("llama", GROUPED)
    exported(folder)
    fields = GGUFReader(next((folder.parent / "out-f32").glob("*.gguf"))).fields
    tokenizer = load_tokenizer(str(folder))
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tokenizer.backend.token_to_id("<|im_end|>")
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_id
    assert fields["llama.context_length"].contents() == 512


def sentencepiece_folder(folder: Path, *, adds_space: bool) -> Path:
    """A tokenizer with a vocabulary of letters, a few merges, and bytes for the rest."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyzH"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("l", "l"), ("o", "r"), ("▁", "w"), ("▁w", "or")]
    pieces += ["".join(pair) for pair in merges]
    model = models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if adds_space else "never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("adds_space", [True, False])
def test_a_sentencepiece_vocabulary_merges_in_the_same_order(adds_space: bool, make_model: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_folder(tmp_path / "pieces", adds_space=adds_space)))
    report = exported(make_model("llama", GROUPED, tokenizer))
    assert found(report, "transformers").passed
    detail = found(report, "llama.cpp").detail
    # llama.cpp puts a space before every text, tokenizers none before one that begins with a space; the report says so
    assert detail == ("cuts 1 of 5 texts otherwise: '  two  spaces\\tand\\n\\n lines \\r\\n end '" if adds_space else "cuts text alike")


PHI3_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"


def with_turns(folder: Path, *, strips: bool, end: str = "<|end|>") -> Tokenizer:
    """A SentencePiece vocabulary with tokens for turns, which may take the white space behind them, as Phi-3's do."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    sentencepiece_folder(folder, adds_space=True)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    turns = ["<|user|>", "<|assistant|>", end]
    backend.add_special_tokens([AddedToken(turn, rstrip=strips, normalized=False) for turn in turns])
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": PHI3_TEMPLATE.replace("<|end|>", end)}))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("strips", [True, False])
def test_a_conversation_is_cut_as_in_training(strips: bool, make_model: Any, tmp_path: Path) -> None:
    from gguf import GGUFReader

    report = exported(make_model("phi3", FAMILIES["phi3"], with_turns(tmp_path / "pieces", strips=strips)))
    fields = GGUFReader(next(Path(report.output).glob("*.gguf"))).fields
    assert fields["general.name"].contents() == ("model (Phi-3)" if strips else "model")
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False  # a text's first word has one, what follows `<|user|>` has none
    detail = found(report, "llama.cpp").detail
    assert PHI3_TEMPLATE[-6:-2] not in detail
    assert "<|user|>" not in detail


def test_llama_cpp_stops_where_the_model_does(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("llama", GROUPED, with_turns(tmp_path / "pieces", strips=False, end="<turn-over>"))
    assert found(exported(folder), "llama.cpp").passed
    monkeypatch.setattr("gguf.GGUFWriter.add_eot_token_id", lambda self, token: None)
    with pytest.raises(GateError, match="it does not stop at '<turn-over>'"):
        exported(folder, "f16")


def test_a_number_that_llama_cpp_reads_otherwise_is_found_by_running_it(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from ftcli.exporting.gguf import read_back

    def config_as_meant(path: Path) -> Any:
        config = config_in(path)
        config.rope_parameters["rope_theta"] = 10_000.0
        return config

    folder, config_in = make_model("llama", GROUPED), read_back.config_in
    monkeypatch.setattr("gguf.GGUFWriter.add_rope_freq_base", lambda self, base: self.add_float32("llama.rope.freq_base", 10.0))
    monkeypatch.setattr(read_back, "config_in", config_as_meant)
    with pytest.raises(GateError, match=r"run by llama\.cpp") as caught:
        exported(folder, "q8_0")
    assert "loaded by transformers" not in str(caught.value)


def test_a_name_does_not_change_how_text_is_cut(tmp_path: Path) -> None:
    from ftcli.exporting.gguf.file import _title

    plain, stripping = (load_tokenizer(str(with_turns(tmp_path / str(strips), strips=strips).folder)) for strips in (False, True))
    assert _title("my-Phi3-run", plain) == "my-phi 3-run"
    assert _title("my-Phi3-run", stripping) == "my-Phi3-run"
    assert _title("orders", stripping) == "orders (Phi-3)"
    assert _title("orders", plain) == "orders"


def byte_level_tokenizer(folder: Path, expression: str | None) -> Tokenizer:
    """A byte-level BPE with merges over letters, digits and spaces, cut by `expression`."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    from ftcli.exporting.gguf.vocabulary import PROBE_TEXTS

    backend = Backend(models.BPE())
    split = [] if expression is None else [pre_tokenizers.Split(Regex(expression), behavior="isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator([text for text in PROBE_TEXTS for _ in range(3)], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}))
    return load_tokenizer(str(folder))


def test_the_rule_for_cutting_text_is_found_by_what_it_does(tmp_path: Path) -> None:
    from ftcli.exporting.gguf.vocabulary import RULES, vocabulary_of

    for name in ("gpt-2", "qwen2"):
        tokenizer = byte_level_tokenizer(tmp_path / name, RULES[name][0])
        assert vocabulary_of(tokenizer, 700).rule == name
    with pytest.raises(RequestError, match="cuts text as none of"):
        vocabulary_of(byte_level_tokenizer(tmp_path / "other", r"[aeiou]|[^aeiou]+"), 700)


def test_llama_cpp_cuts_by_the_rule_that_was_found(make_model: Any, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from ftcli.exporting.gguf.vocabulary import RULES

    tokenizer = byte_level_tokenizer(tmp_path / "pieces", RULES["qwen2"][0])
    assert found(exported(make_model("qwen2", GROUPED, tokenizer)), "llama.cpp").detail == "cuts text alike"


def test_an_error_of_order_is_found_and_leaves_nothing(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.exporting.gguf import families

    folder = make_model("llama", GROUPED)
    monkeypatch.setattr(families, "interleaved", lambda tensor, num_heads: tensor)
    for kind in ("f32", "q4_0"):
        with pytest.raises(GateError, match=r"tensors that differ: model.layers.0.self_attn.(q|k)_proj"):
            exported(folder, kind)
        assert not (folder.parent / f"out-{kind}").exists()
        assert not list(folder.parent.glob(".partial-*"))


def test_a_tensor_that_became_nan_is_found() -> None:
    from ftcli.exporting.gguf.read_back import _wrong_tensors

    source, loaded = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    loaded.load_state_dict(source.state_dict())
    assert not _wrong_tensors(source, loaded, "q4_0")
    with torch.no_grad():
        loaded.weight[0, 0] = float("nan")
    assert _wrong_tensors(source, loaded, "q4_0") == ["weight (by nan)"]


def test_weights_that_are_too_large_for_16_bits_are_refused(make_model: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model("llama", GROUPED)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GateError, match=r"no finite numbers in f16"):
        exported(folder, "f16")
    assert exported(folder, "bf16").kind == "gguf"


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("gpt_neox", SIZES, r"`gpt_neox` is not a family ftcli can write \(families: Llama, Mistral, Qwen2"),
        ("gemma2", {**GEMMA, "query_pre_attn_scalar": 100}, "no place for `query_pre_attn_scalar: 100`"),
        ("gemma3_text", {**GEMMA, "layer_types": ["full_attention"] * 2}, "`layer_types` other than"),
        ("llama", {**GROUPED, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE of type `dynamic`"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(architecture: str, config: dict[str, Any], message: str, make_model: Any) -> None:
    with pytest.raises(RequestError, match=message):
        exported(make_model(architecture, config))


def test_a_disk_that_fills_up_is_named(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: Any, *arguments: Any, **named: Any) -> None:
        raise OSError("98304 requested and 18176 written")  # what numpy says

    folder = make_model("llama", GROUPED)
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", write)
    with pytest.raises(RunError, match="the disk is full"):
        exported(folder)
    assert not (folder.parent / "out-f32").exists()


WIDE = {**GROUPED, "hidden_size": 256, "intermediate_size": 512}


def test_k_quants_without_llama_cpp_name_the_extra(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftcli.exporting.gguf.k_quants.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as caught:
        exported(make_model("llama", WIDE), "q4_k_m")
    assert "ftcli[llama-cpp]" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"])
def test_k_quants_are_made_by_llama_cpp_and_read_by_both(kind: str, make_model: Any) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from gguf import GGUFReader

    report = exported(make_model("llama", WIDE), kind)
    assert all(check.passed for check in report.checks)
    assert not any("other types" in check.name for check in report.checks)
    files = [path.name for path in Path(report.output).iterdir()]
    assert f"model-{kind}.gguf" in files
    assert not any(name.endswith(".f32") for name in files)
    stored = {tensor.tensor_type.name for tensor in GGUFReader(Path(report.output) / f"model-{kind}.gguf").tensors if len(tensor.shape) > 1}
    assert kind[:4].upper() in stored
    assert stored <= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"])
def test_every_family_has_k_quants(family: str, make_model: Any) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    wide = {"n_embd": 256} if family == "gpt2" else {"hidden_size": 256, "intermediate_size": 512}
    report = exported(make_model(family, {**FAMILIES[family], **wide}), "q4_k_m")
    assert all(check.passed for check in report.checks)


def test_tensors_of_a_k_quant_that_have_another_type_are_named(make_model: Any) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    report = exported(make_model("llama", {**WIDE, "intermediate_size": 480}), "q4_k_s")
    told = next(check for check in report.checks if "other types" in check.name)
    assert "2 as q5_0 (blk.0.ffn_down.weight, blk.1.ffn_down.weight)" in told.detail.replace("q5_1", "q5_0")


def test_a_model_of_short_rows_has_no_k_quant(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftcli.exporting.gguf.k_quants.find_spec", lambda name: object())
    with pytest.raises(RequestError, match=r"rows are 64 and 96 long, `q5_k_m` has blocks of 256\s+hint: --dtype q5_1"):
        exported(make_model("llama", GROUPED), "q5_k_m")


def test_a_k_quant_that_fails_leaves_nothing(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from ftcli.exporting.gguf import k_quants

    monkeypatch.setattr("ftcli.exporting.formats.gguf.quantise", lambda plain, path, kind: k_quants.quantise(plain, path / "no", kind))
    folder = make_model("llama", WIDE)
    with pytest.raises(RunError, match=r"llama.cpp could not write q6_k"):
        exported(folder, "q6_k")
    assert not (folder.parent / "out-q6_k").exists()
    assert not list(folder.parent.glob(".partial-*"))
