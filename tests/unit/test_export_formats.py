"""`ftcli export`: hf, adapter, int8, int4 and vllm folders, loaded back by what is to use them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcli.errors import GateError, RequestError, UsageError
from ftcli.exporting.checks import Check
from ftcli.exporting.difference import Difference, logits_on
from ftcli.exporting.export import export
from ftcli.exporting.formats.adapter import Adapter
from ftcli.exporting.formats.hf import Hf
from ftcli.exporting.formats.int4 import Int4
from ftcli.exporting.formats.int8 import Int8
from ftcli.exporting.formats.vllm import Vllm
from ftcli.models.load import load_model, save_model
from ftcli.models.settings import Init, Model
from ftcli.models.tokenizer import Tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.2}


@pytest.fixture
def base(make_tokenizer: Callable[..., Tokenizer], tmp_path: Path) -> Path:
    """A tiny Llama that talks ChatML."""
    tokenizer = make_tokenizer()
    folder = tmp_path / "base"
    save_model(load_model(Model(init=Init(architecture="llama", config=SIZES)), tokenizer, seed=1), tokenizer, folder)
    return folder


@pytest.fixture
def make_adapter(base: Path) -> Callable[..., Path]:
    """Makes an adapter on the base with factors that change every answer."""

    def make(name: str, *, on: Path | None = None, **settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(on or base)
        module = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}))
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        module.peft_config["default"].base_model_name_or_path = str(on or base)
        folder = base.parent / name
        module.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_folder_loads_bit_for_bit_and_stops_where_it_was_trained_to(dtype: str, make_adapter: Any) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    adapter = make_adapter("one")
    output = adapter.parent / "out"
    report = export([str(adapter)], Hf(dtype), output)
    assert [check.passed for check in report.checks] == [True] * 4
    assert report.checks[1].difference is not None
    assert report.checks[1].difference.kl < (1e-9 if dtype == "float32" else 1e-2)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert sorted(GenerationConfig.from_pretrained(output).eos_token_id) == sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    assert {str(tensor.dtype) for tensor in load_file(output / "model.safetensors").values()} == {f"torch.{dtype}"}


def test_shards_are_as_small_as_asked(base: Path, tmp_path: Path) -> None:
    report = export([str(base)], Hf("float32", 100_000), tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert max(path.stat().st_size for path in shards) < 120_000
    assert all(check.passed for check in report.checks)


def test_the_manifest_and_the_card_say_what_went_in(make_adapter: Any) -> None:
    from ftcli.files import sha256_of

    adapter = make_adapter("one")
    export([str(adapter)], Hf(), adapter.parent / "out")
    manifest = json.loads((adapter.parent / "out" / "manifest.json").read_text())
    inputs = manifest["sources"][0]["inputs"]
    assert inputs["adapter_model.safetensors"] == sha256_of(adapter / "adapter_model.safetensors")
    assert inputs["base/model.safetensors"] == sha256_of(adapter.parent / "base" / "model.safetensors")
    card = (adapter.parent / "out" / "README.md").read_text()
    assert str(adapter.parent) not in card
    assert "| merged = attached, float32 | passed |" in card


def broken(file: Path, name: str, value: float) -> str:
    """The file with one number replaced; gives the name of the tensor."""
    tensors = load_file(file)
    found = next(key for key in tensors if name in key)
    tensors[found][0, 0] = value
    save_file(tensors, file, {"format": "pt"})
    return found


@pytest.mark.parametrize("form", [Hf(), Int4()])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_named_before_anything_is_written(form: Any, value: float, base: Path, tmp_path: Path) -> None:
    broken(base / "model.safetensors", "layers.1.mlp.up_proj", value)
    with pytest.raises(RequestError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: NaN or infinite numbers: 1$"):
        export([str(base)], form, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["hf", "merge"])
def test_weights_beyond_float16_are_named_before_anything_is_written(kind: str, make_adapter: Any, base: Path, tmp_path: Path) -> None:
    from ftcli.exporting.merge_run import merge_folder

    adapter, output = make_adapter("one"), tmp_path / "out"
    name = broken(base / "model.safetensors", "layers.1.mlp.up_proj", 1e5)
    ask: dict[str, Callable[[], object]] = {
        "hf": lambda: export([str(base)], Hf("float16"), output),
        "merge": lambda: merge_folder(str(base), adapter, output, dtype="float16"),
    }
    with pytest.raises(RequestError, match=r"1 tensor is beyond float16") as error:
        ask[kind]()
    assert [(problem.where, problem.what) for problem in error.value.problems] == [
        (name, "its largest number is 1e+05, float16 ends at 6.55e+04")
    ]
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    if kind == "hf":
        assert export([str(base)], Hf("bfloat16"), tmp_path / "out").dtype == "bfloat16"


def test_a_check_with_nan_says_that_it_failed() -> None:
    assert Check("logits", True, difference=Difference(float("nan"), 0.0, 3)).line().startswith("FAILED: ")


def test_an_adapter_with_nan_is_named_and_not_merged(make_adapter: Any) -> None:
    from ftcli.exporting.merge_run import merge_folder

    adapter = make_adapter("one")
    name = broken(adapter / "adapter_model.safetensors", "lora_A", float("nan")).removeprefix("base_model.model.")
    message = name.replace(".", r"\.")
    for form in (Hf(), Adapter()):
        with pytest.raises(RequestError, match=message):
            export([str(adapter)], form, adapter.parent / "out")
    with pytest.raises(RequestError, match=message):
        merge_folder(str(adapter.parent / "base"), adapter, adapter.parent / "out")
    assert not (adapter.parent / "out").exists()


def test_a_comparison_with_nan_is_nan_and_passes_no_check(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.exporting.difference import compare

    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    sick = logits.clone()
    sick[2, 3] = float("nan")
    assert "KL nan" in compare(logits, sick).line()
    assert "KL nan" in compare(sick, logits).line()
    assert not compare(logits, sick).is_number
    masked = logits.clone()
    masked[:, 0] = float("-inf")  # a token that never comes
    assert compare(masked, masked).kl == 0.0
    assert compare(logits, logits).kl == 0.0

    monkeypatch.setattr("ftcli.exporting.weight_only.logits_on", lambda module, probe: logits_on(module, probe) * float("nan"))
    adapter = make_adapter("one")
    with pytest.raises(GateError, match="KL nan"):
        export([str(adapter)], Int4(), adapter.parent / "out")
    assert not (adapter.parent / "out").exists()


def test_tied_weights_stay_tied(make_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tied = Init(architecture="llama", config={**SIZES, "tie_word_embeddings": True})
    save_model(load_model(Model(init=tied), tokenizer, seed=1), tokenizer, tmp_path / "tied")
    export([str(tmp_path / "tied")], Hf("bfloat16"), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_an_adapter_is_loaded_by_peft_alone(make_adapter: Any) -> None:
    adapter = make_adapter("one", use_rslora=True)
    report = export([str(adapter)], Adapter(), adapter.parent / "out")
    check = report.checks[0]
    assert check.passed
    assert check.difference is not None
    assert check.difference.kl < 1e-9
    assert (adapter.parent / "out" / "tokenizer.json").is_file()


def test_an_adapter_that_computes_otherwise_is_not_exported(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.exporting.formats import adapter as adapter_format

    copy = adapter_format.copy_adapter

    def copy_wrong(source: Any, folder: Path) -> None:
        copy(source, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")

    monkeypatch.setattr(adapter_format, "copy_adapter", copy_wrong)
    adapter = make_adapter("one")
    with pytest.raises(GateError, match="loaded by PEFT"):
        export([str(adapter)], Adapter(), adapter.parent / "out")
    assert not (adapter.parent / "out").exists()


def test_a_merge_that_differs_leaves_nothing(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.methods import adapter as merging

    true_merge = merging._merged_weight
    monkeypatch.setattr(merging, "_merged_weight", lambda layer, weight: true_merge(layer, weight) * 1.01)
    adapter = make_adapter("one")
    with pytest.raises(GateError, match="merged = attached"):
        export([str(adapter)], Hf(), adapter.parent / "out")
    assert not (adapter.parent / "out").exists()


@pytest.mark.parametrize(("form", "most"), [(Int8(), 0.01), (Int4(), 0.5), (Int4("fp4"), 0.5)])
def test_quantised_folders_load_in_transformers(form: Any, most: float, base: Path, tmp_path: Path) -> None:
    report = export([str(base)], form, tmp_path / "out")
    check = next(check for check in report.checks if "transformers" in check.name)
    assert check.passed
    assert check.difference is not None
    assert 0 < check.difference.kl < most
    assert check.detail == "14 linear layers quantised"
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_many_adapters_are_laid_out_beside_their_base(make_adapter: Any) -> None:
    first, second = make_adapter("one", r=4), make_adapter("three", r=12)
    output = first.parent / "out"
    report = export([str(first), str(second)], Vllm(), output)
    assert [check.passed for check in report.checks] == [True, True, None]
    script = (output / "serve.sh").read_text()
    assert "--max-lora-rank 16 --max-loras 2 --lora-modules one=./adapters/one three=./adapters/three" in script
    assert "vllm serve ./base --host 127.0.0.1" in script
    config = json.loads((output / "adapters" / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../../base"
    assert (output / "base" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "it is DoRA"),
        ({"modules_to_save": ["lm_head"]}, "brings modules of its own: lm_head"),
        ({"rank_pattern": {"q_proj": 2}}, "different ranks"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(settings: dict[str, Any], message: str, make_adapter: Any) -> None:
    adapter = make_adapter("one", **settings)
    with pytest.raises(RequestError, match=message):
        export([str(adapter)], Vllm(), adapter.parent / "out")


def test_adapters_of_two_bases_are_not_served_together(make_adapter: Any, base: Path) -> None:
    import shutil

    shutil.copytree(base, base.parent / "other")
    first, second = make_adapter("one"), make_adapter("three", on=base.parent / "other")
    with pytest.raises(RequestError, match="are on 2 bases"):
        export([str(first), str(second)], Vllm(), base.parent / "out")


def test_requests_that_cannot_be_met_are_refused_before_weights_are_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    output = tmp_path / "out"
    with pytest.raises(RequestError, match="holds no adapter in PEFT's layout"):
        export([str(base)], Adapter(), output)
    with pytest.raises(UsageError, match="holds one model, 2 are given"):
        export([str(base), str(base)], Hf(), output)
    with pytest.raises(UsageError, match="exists already"):
        export([str(base)], Hf(), base)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr("ftcli.models.load.load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(RequestError, match="the disk has no room"):
        export([str(base)], Hf(), output)
    assert not output.exists()


def test_a_dtype_of_another_format_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--dtype q8_0 is not offered by `hf`(.|\n)*float32, bfloat16, float16"):
        Hf("q8_0")
