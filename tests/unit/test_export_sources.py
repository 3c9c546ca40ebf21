"""`ftcli export`: sources that have changed, that are quantised already, that are classifiers, or whose files are odd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftcli.errors import RequestError, UsageError
from ftcli.exporting.export import export
from ftcli.exporting.formats.gguf import Gguf
from ftcli.exporting.formats.gptq import Gptq
from ftcli.exporting.formats.hf import Hf
from ftcli.exporting.formats.int4 import Int4
from ftcli.exporting.formats.int8 import Int8
from ftcli.exporting.formats.onnx import Onnx
from ftcli.methods.context import AttachContext
from ftcli.methods.full import Full
from ftcli.methods.lora import Lora
from ftcli.methods.qlora import Qlora
from ftcli.models.fingerprint import base_fingerprint, note_base
from ftcli.models.load import load_model
from ftcli.models.settings import Model
from ftcli.models.tokenizer import load_tokenizer
from ftcli.recipe.load import load_recipe
from ftcli.recipe.write import resolved_yaml
from ftcli.training.seeds import derive_seed


@pytest.fixture
def make_run(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a finished run, with the fingerprint of its base."""

    def make(method: Any, objective: dict[str, Any] | None = None, dtype: str = "auto") -> Path:
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"row {i}", "label": "ab"[i % 2]}) + "\n" for i in range(30)))
        document = {
            "version": 1,
            "name": "trial",
            "model": {"base": str(base), "dtype": dtype},
            "data": {"train": [{"source": {"kind": "file", "path": str(tmp_path / "texts.jsonl")}}]},
            "method": method.model_dump(mode="json"),
            **({} if objective is None else {"objective": objective}),
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(document))
        recipe = load_recipe(tmp_path / "recipe.yaml").recipe
        run = tmp_path / "runs" / "trial"
        run.mkdir(parents=True)
        (run / "recipe.resolved.yaml").write_text(resolved_yaml(recipe))
        tokenizer = recipe.model.load_tokenizer()
        given = {"dtype": dtype, "quantization": method.quantization(), "head": recipe.objective.head}
        loaded = load_model(recipe.model, tokenizer, seed=derive_seed(17, "model"), **given)
        fingerprint = base_fingerprint(loaded)
        (run / "manifest.json").write_text(json.dumps({"base": str(base), "base_fingerprint": fingerprint}))
        module = method.attach(loaded, AttachContext(seed=1))
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(parameter.dtype)
        method.save(module, run / method.artefact)
        tokenizer.save(run / method.artefact)
        if method.artefact == "adapter":
            note_base(run / "adapter", str(base), fingerprint)
        return run

    return make


def change(base: Path) -> None:
    """Other weights of the same shapes."""
    path = base / "model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("what", ["run", "adapter"])
def test_a_base_that_changed_since_the_training_is_refused(what: str, make_run: Any, base: Path, tmp_path: Path) -> None:
    from ftcli.exporting.merge_run import merge_run

    run = make_run(Lora(rank=2))
    target = str(run if what == "run" else (run / "adapter").rename(tmp_path / "alone"))
    assert export([target], Hf(), tmp_path / "out").checks[0].passed
    change(base)
    with pytest.raises(RequestError, match=r"was trained on `.*base`, which is another model now"):
        export([target], Hf(), tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
    if what == "run":
        with pytest.raises(RequestError, match="which is another model now"):
            merge_run(run, tmp_path / "out2")


@pytest.mark.parametrize("method", [Lora(rank=2), Qlora(rank=2)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_that_was_rounded_for_the_training_is_still_the_same(dtype: str, method: Any, make_run: Any, tmp_path: Path) -> None:
    run = make_run(method, dtype=dtype)
    assert export([str(run)], Hf(), tmp_path / "out").checks[0].passed
    alone = (run / "adapter").rename(tmp_path / "alone")
    assert export([str(alone)], Hf(), tmp_path / "out2").checks[0].passed


def test_a_run_that_left_a_whole_model_needs_no_base(make_run: Any, base: Path, tmp_path: Path) -> None:
    run = make_run(Full())
    change(base)
    assert export([str(run)], Hf(), tmp_path / "out").checks[0].passed


CLASSES = {"kind": "classification", "task": "single", "labels": ["a", "b"]}


@pytest.mark.parametrize("form", [Hf(), Onnx(), Int8(), Gptq(), Gguf()])
def test_a_classifier_is_refused_before_its_weights_are_read(
    form: Any, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(Lora(rank=2), CLASSES)
    monkeypatch.setattr("ftcli.models.load.load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(RequestError, match=r"is a classifier, and no language model\s+hint: `ftcli merge .*trial -o OUT`"):
        export([str(run)], form, tmp_path / "out")


@pytest.mark.parametrize("device", ["gpu", "cuda:7"])
def test_a_device_that_is_not_here_is_a_usage_error(device: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--device {device}: there is no such device here"):
        export([str(base)], Hf(), tmp_path / "out", device=device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [Int8(), Int4()])
def test_a_quantised_folder_becomes_what_it_computes_with(stored: Any, dtype: str, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    folder = tmp_path / "stored"
    export([str(base)], Hf(dtype), tmp_path / "plain")
    export([str(tmp_path / "plain")], stored, folder)
    for form, name in ((Hf("float32"), "hf"), (Gguf("q8_0"), "gguf"), (Int8(), "int8")):
        report = export([str(folder)], form, tmp_path / name)
        assert all(check.passed is not False for check in report.checks)
        assert report.checks[1].difference is not None
        assert report.checks[1].difference.kl < (1e-8 if name == "hf" else 2e-2)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written.keys() == plain.keys()
    errors = {name: float((written[name] - plain[name]).norm() / plain[name].norm()) for name in plain}
    assert max(errors.values()) < 0.3  # bitsandbytes rounds rows that are no multiple of 64 long by 0.23


@pytest.mark.parametrize("stored", [Int8(), Int4()])
def test_an_adapter_on_a_quantised_folder_is_merged_into_what_that_computes_with(stored: Any, base: Path, make_adapter: Any) -> None:
    folder = base.parent / "stored"
    export([str(base)], stored, folder)
    report = export([str(make_adapter("one", on=folder))], Hf(), base.parent / "out")
    assert report.checks[0].difference is not None
    assert report.checks[0].difference.kl < 1e-8


def test_weights_that_cannot_be_had_back_are_refused(base: Path, tmp_path: Path) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(RequestError, match="are stored by `compressed-tensors`"):
        export([str(base)], Hf(), tmp_path / "out")


@pytest.mark.parametrize("odd", [{"num_attention_heads": 0}, {"num_hidden_layers": "six"}, {"hidden_size": None}, {"rope_parameters": 3}])
@pytest.mark.parametrize("form", [Hf(), Gguf()])
def test_odd_values_in_a_configuration_are_told(odd: dict[str, Any], form: Any, base: Path, tmp_path: Path) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    with pytest.raises(RequestError, match="the base model cannot be loaded"):
        export([str(base)], form, tmp_path / "out")
    with pytest.raises(RequestError, match="the base model cannot be loaded"):
        load_model(Model(base=str(base)), load_tokenizer(str(base)))


@pytest.mark.parametrize("header", [{"a": {"shape": ["a"]}}, {"a": {"shape": [1.5]}}, {"a": 3}, [1]])
def test_odd_headers_of_weights_are_told(header: Any, base: Path, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(RequestError, match="is not a safetensors file"):
        export([str(base)], Hf(), tmp_path / "out")
