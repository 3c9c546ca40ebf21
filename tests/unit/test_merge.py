"""`merge_run` and `merge_folder`: what is written is proven, and nothing is written that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ftcli.errors import GateError, RequestError, UsageError
from ftcli.exporting.difference import compare
from ftcli.exporting.merge_run import merge_folder, merge_run
from ftcli.methods.context import AttachContext
from ftcli.methods.full import Full
from ftcli.methods.lora import Lora
from ftcli.methods.qlora import Qlora
from ftcli.models.load import load_model, save_model
from ftcli.models.quantisation import Quantization
from ftcli.models.settings import Init, Model
from ftcli.models.tokenizer import Tokenizer
from ftcli.recipe.load import load_recipe
from ftcli.recipe.write import resolved_yaml
from ftcli.training.seeds import derive_seed

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.2}
IDS = torch.arange(24).reshape(2, 12) + 3


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def make_run(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a finished run of a method, as training leaves it, with a checkpoint of step 7."""
    base = tmp_path / "base"
    save_model(load_model(Model(init=Init(architecture="llama", config=LLAMA)), tokenizer, seed=1), tokenizer, base)

    def make(method: Any, dtype: str = "auto") -> Path:
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"row {i} of the text"}) + "\n" for i in range(30)))
        document = {
            "version": 1,
            "name": "trial",
            "model": {"base": str(base), "dtype": dtype},
            "data": {"train": [{"source": {"kind": "file", "path": str(tmp_path / "texts.jsonl")}}]},
            "method": method.model_dump(mode="json"),
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(document))
        recipe = load_recipe(tmp_path / "recipe.yaml").recipe
        run = tmp_path / "runs" / "trial"
        run.mkdir(parents=True)
        (run / "recipe.resolved.yaml").write_text(resolved_yaml(recipe))
        loaded = load_model(recipe.model, tokenizer, quantization=method.quantization(), dtype="float32")
        module = method.attach(loaded, AttachContext(seed=derive_seed(recipe.train.seed, "method")))
        disturb(module)
        method.save(module, run / method.artefact)
        if method.artefact == "model":
            save_model(module, tokenizer, run / "model")
        disturb(module)
        write_checkpoint(module, run / "checkpoints" / "step-000007")
        return run

    return make


def disturb(module: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def write_checkpoint(module: Any, folder: Path) -> None:
    from ftcli.files import sha256_of
    from ftcli.training.checkpoint import trainable_tensors

    folder.mkdir(parents=True)
    save_file(trainable_tensors(module), folder / "trainable.safetensors")
    files = {"trainable.safetensors": sha256_of(folder / "trainable.safetensors")}
    (folder / "progress.json").write_text(json.dumps({"files": files, "progress": {"step": 7, "best_step": 7}}))


def logits(folder: Path, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(Model(base=str(folder)), None, **given)(IDS).logits
    return found


@pytest.mark.parametrize("method", [Lora(rank=4, variant="dora", init="pissa"), Qlora(rank=4), Full()])
def test_a_merged_run_is_an_ordinary_folder_with_its_proof(method: Any, make_run: Any) -> None:
    run = make_run(method)
    report = merge_run(run, run / "merged")
    assert report.difference.kl < 1e-6
    assert report.written.kl < 1e-6
    assert report.difference.argmax_agreement == report.written.argmax_agreement == 1.0
    assert report.difference.num_tokens > 300
    manifest = json.loads((run / "merged" / "manifest.json").read_text())
    assert manifest["proofs"][0]["passed"]
    assert {"recipe.resolved.yaml", "base/model.safetensors"} < set(manifest["inputs"])
    card = (run / "merged" / "README.md").read_text()
    assert "100.00 %" in card
    assert str(run.parent.parent) not in card
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(run / "merged").dtype == torch.float32
    assert AutoTokenizer.from_pretrained(run / "merged").eos_token == "</s>"


def test_other_targets_of_a_quantised_base_are_measured(make_run: Any) -> None:
    run = make_run(Qlora(rank=4))
    report = merge_run(run, run / "merged", compare_targets=True)
    assert report.targets.keys() == {"original", "requantised"}
    assert all(difference.kl > 1e-5 > report.difference.kl for difference in report.targets.values())


@pytest.mark.parametrize("target", ["original", "requantised"])
def test_another_target_is_written_and_says_that_it_is_not_equal(target: str, make_run: Any) -> None:
    run = make_run(Qlora(rank=4))
    report = merge_run(run, run / "merged", target=target)
    assert report.written.kl > 1e-5
    assert not json.loads((run / "merged" / "manifest.json").read_text())["proofs"][0]["passed"]


def test_a_requantised_merge_survives_another_quantisation(make_run: Any) -> None:
    run = make_run(Qlora(rank=4, quantize=Quantization(double_quant=False)))
    merge_run(run, run / "merged", target="requantised")
    again = logits(run / "merged", quantization=Quantization(double_quant=False))
    torch.testing.assert_close(again, logits(run / "merged"), rtol=0, atol=1e-4)


@pytest.mark.parametrize("checkpoint", ["best", "last", "7", "step-000007"])
def test_a_checkpoint_can_be_merged(checkpoint: str, make_run: Any) -> None:
    run = make_run(Lora(rank=4, init="olora"))
    merge_run(run, run / "result")
    report = merge_run(run, run / "merged", checkpoint=checkpoint)
    assert report.difference.kl < 1e-6
    assert not torch.allclose(logits(run / "merged"), logits(run / "result"), atol=1e-2)


def test_a_checkpoint_of_full_training_becomes_a_model(make_run: Any) -> None:
    run = make_run(Full())
    merge_run(run, run / "merged", checkpoint="7")
    assert not torch.allclose(logits(run / "merged"), logits(run / "model"), atol=1e-2)


def test_the_proof_is_in_float32_and_the_rounding_is_shown(make_run: Any) -> None:
    run = make_run(Qlora(rank=4))
    report = merge_run(run, run / "merged", dtype="bfloat16")
    assert report.difference.kl < 1e-6 < report.written.kl < 1e-2
    assert "rounded to bfloat16" in report.line()
    assert merge_run(run, run / "again").dtype == "float32"


def test_a_merge_that_differs_leaves_nothing(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.methods import adapter

    run = make_run(Lora(rank=4))
    true_merge = adapter._merged_weight
    monkeypatch.setattr(adapter, "_merged_weight", lambda layer, weight: true_merge(layer, weight) * 1.01)
    with pytest.raises(GateError, match="must be below 1e-06 and 100 %"):
        merge_run(run, run / "merged")
    assert not any(path.name.endswith("merged") for path in run.iterdir())


def test_files_that_differ_leave_nothing(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(Lora(rank=4))

    def save_wrong(model: Any, tokenizer: Any, folder: Path) -> None:
        with torch.no_grad():
            model.model.norm.weight[0] += 1
            save_model(model, tokenizer, folder)
            model.model.norm.weight[0] -= 1

    monkeypatch.setattr("ftcli.models.load.save_model", save_wrong)
    with pytest.raises(GateError, match=r"tensors that differ: model.norm.weight"):
        merge_run(run, run / "merged")
    assert not any(path.name.endswith("merged") for path in run.iterdir())


def test_data_that_are_gone_do_not_stop_a_merge(make_run: Any) -> None:
    run = make_run(Lora(rank=4))
    (run.parent.parent / "texts.jsonl").unlink()
    assert merge_run(run, run / "merged").difference.num_tokens > 100


def test_an_adapter_without_a_run_is_merged(make_run: Any) -> None:
    run = make_run(Qlora(rank=4, variant="rslora"))
    base = str(run.parent.parent / "base")
    report = merge_folder(base, run / "adapter", run / "merged", quantization=Quantization())
    assert report.difference.kl < 1e-6
    merge_run(run, run / "same")
    assert torch.equal(logits(run / "merged"), logits(run / "same"))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda run: merge_run(run.parent, run / "merged"), "is not a run folder"),
        (lambda run: merge_run(run, run / "merged", checkpoint="8"), "no checkpoint `8`"),
        (lambda run: merge_run(run, run / "merged", target="original"), "is for a quantised base"),
        (lambda run: merge_run(run, run / "merged", target="origin"), "unknown merge target"),
        (lambda run: merge_run(run, run / "merged", dtype="int8"), "unknown dtype"),
        (lambda run: merge_run(run, run / "adapter"), "exists already"),
        (lambda run: merge_folder(str(run.parent.parent / "base"), run / "nothing", run / "merged"), "is no folder with an adapter"),
    ],
)
def test_a_wrong_request_is_refused(act: Callable[[Path], None], message: str, make_run: Any) -> None:
    with pytest.raises(UsageError, match=message):
        act(make_run(Lora(rank=4)))


def test_an_unfinished_run_names_its_checkpoints(make_run: Any) -> None:
    run = make_run(Lora(rank=4))
    (run / "adapter").rename(run / "elsewhere")
    with pytest.raises(RequestError, match=r"is not finished(.|\n)*7"):
        merge_run(run, run / "merged")


def test_near_ties_may_change_places() -> None:
    expected = torch.tensor([[0.5, 0.49999, 0.00001]]).log()
    swapped = torch.tensor([[0.49999, 0.5, 0.00001]]).log()
    assert compare(expected, swapped).argmax_agreement == 1.0
    assert compare(expected, expected.flip(-1)).argmax_agreement == 0.0
    assert compare(expected, expected + 5).kl == pytest.approx(0, abs=1e-12)
