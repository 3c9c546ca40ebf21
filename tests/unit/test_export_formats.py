"""`ftcli export`: hf, int8 and int4 folders, loaded back by what is to use them; what every format answers."""

from __future__ import annotations

import json
import os
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
from ftcli.files import file_hashes
from ftcli.models.load import load_model, save_model
from ftcli.models.settings import Init, Model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.2}


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
    beside = {f"base/{path.name}": path for path in (adapter.parent / "base").iterdir()}
    assert {"base/model.safetensors", "base/config.json", "base/tokenizer.json", "base/chat_template.jinja"} <= set(beside)
    assert {name: digest for name, digest in inputs.items() if name.startswith("base/")} == {
        name: sha256_of(path) for name, path in beside.items()
    }
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


def test_two_exports_into_one_folder_never_mix(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first is at work, in whatever format, and the first ends as if there had been no second."""
    first, second = make_adapter("one"), make_adapter("other")
    output, met = first.parent / "out", []
    write = Hf.write

    def with_company(form: Hf, subject: Any, folder: Path) -> None:
        monkeypatch.setattr(Hf, "write", write)
        for other in (Hf(), Adapter()):
            with pytest.raises(UsageError, match=rf"`{output}` is being written by process {os.getpid()}"):
                export([str(second)], other, output)
            met.append(other.kind)
        write(form, subject, folder)

    monkeypatch.setattr(Hf, "write", with_company)
    export([str(first)], Hf(), output)
    assert met == ["hf", "adapter"]
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["files"] == file_hashes(output, left_out=("manifest.json", "README.md"))
    assert manifest["sources"][0]["name"] == "one"
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []


def test_what_came_to_stand_at_the_name_meanwhile_stays(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Hf.write

    def with_company(form: Hf, subject: Any, folder: Path) -> None:
        write(form, subject, folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")

    monkeypatch.setattr(Hf, "write", with_company)
    with pytest.raises(UsageError, match="exists already"):
        export([str(base)], Hf(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_template_that_refuses_the_probe_is_compared_as_text(base: Path, tmp_path: Path) -> None:
    template = base / "chat_template.jinja"
    refusal = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    report = export([str(base)], Hf(), tmp_path / "out")
    check = next(check for check in report.checks if "template" in check.name)
    assert check.passed
    assert "refuses the probe" in check.detail
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template.read_text()


@pytest.mark.parametrize("form", [Hf(), Vllm()])
def test_no_file_names_a_folder_of_this_machine(form: Any, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter("one")
    (adapter / "base.json").write_text(json.dumps({"base": str(tmp_path / "base"), "fingerprint": "unknown:0"}))
    export([str(adapter)], form, tmp_path / "out")
    named = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    assert named == []
