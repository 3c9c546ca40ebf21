"""`init_from`: a run that begins where another ended, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftcli.cli.main import run
from ftcli.exporting.open_target import open_target

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
STACK = {"path": "lora", "adapter": "stack"}
IDS = torch.randint(4, 3000, (2, 12), generator=torch.Generator().manual_seed(1))


def write_recipe(folder: Path, name: str, method: dict[str, Any], **parts: Any) -> Path:
    """A short run on a tiny random model that is saved in `folder`."""
    document = {
        "version": 1,
        "name": name,
        "model": {"base": str(folder / "base")},
        "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": 12}], "max_length": 256, "holdout": 0.0},
        "method": method,
        "train": {"steps": 4, "global_batch_size": 3, "lr": 1e-2},
        "every": {"log": 2, "save": 2},
        "output": str(folder / name),
        **parts,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return path


def train(folder: Path, name: str, method: dict[str, Any], **parts: Any) -> Path:
    assert run(["train", str(write_recipe(folder, name, method, **parts))]) == 0
    return folder / name


@torch.no_grad()
def logits(target: Path) -> torch.Tensor:
    found: torch.Tensor = open_target(str(target), device="cpu").model(IDS).logits
    return found


def save_base(folder: Path, seed: int) -> None:
    from ftcli.models.load import load_model, save_model
    from ftcli.models.settings import Init, Model
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("builtin:tiny")
    model = load_model(Model(init=Init(architecture="llama", config=TINY), tokenizer="builtin:tiny"), tokenizer, seed=seed)
    save_model(model, tokenizer, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases of the same shapes, and a finished run of each of two methods on the first."""
    folder = tmp_path_factory.mktemp("init-from")
    save_base(folder / "base", 3)
    save_base(folder / "other", 4)
    train(folder, "lora", LORA)
    train(folder, "full", {"kind": "full"})
    return folder


NO_STEP = {"train": {"steps": 1, "global_batch_size": 3, "lr": 1e-30}}


@pytest.mark.parametrize("path", ["lora", "lora/adapter", "lora/checkpoints/step-000004"])
def test_a_kept_adapter_goes_on_where_it_stood(world: Path, path: str) -> None:
    name = "kept-" + path.replace("/", "-")
    found = train(world, name, LORA, init_from={"path": str(world / path)}, **NO_STEP)
    torch.testing.assert_close(logits(found), logits(world / "lora"), rtol=0, atol=1e-5)
    note = json.loads((found / "manifest.json").read_text())["init_from"]
    assert note["path"] == str(world / path)
    assert len(note["sha256"]) == 64


def test_a_kept_adapter_moves_on_with_another_dropout(world: Path) -> None:
    found = train(world, "kept-on", {**LORA, "dropout": 0.1}, init_from={"path": str(world / "lora")})
    assert (logits(found) - logits(world / "lora")).abs().max() > 1e-3


def test_an_adapter_without_a_run_can_be_kept(world: Path) -> None:
    shutil.copytree(world / "lora" / "adapter", world / "elsewhere", dirs_exist_ok=True)
    found = train(world, "from-folder", LORA, init_from={"path": str(world / "elsewhere")}, **NO_STEP)
    torch.testing.assert_close(logits(found), logits(world / "lora"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [{**LORA, "rank": 2, "variant": "rslora"}, {"kind": "lora", "rank": 8, "rank_pattern": {"q_proj": 3}}])
def test_a_stacked_adapter_begins_at_the_earlier_one_and_is_one_adapter_on_the_original_base(world: Path, method: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name = f"stacked-{method['rank']}"
    start = train(world, f"{name}-start", method, init_from={"path": str(world / "lora"), "adapter": "stack"}, **NO_STEP)
    torch.testing.assert_close(logits(start), logits(world / "lora"), rtol=0, atol=1e-5)
    found = train(world, name, method, init_from={"path": str(world / "lora"), "adapter": "stack"})
    assert (logits(found) - logits(start)).abs().max() > 1e-3
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    with torch.no_grad():
        elsewhere = PeftModel.from_pretrained(base, str(found / "adapter")).eval()(IDS).logits
    torch.testing.assert_close(elsewhere, logits(found), rtol=0, atol=1e-5)
    assert run(["merge", str(found)]) == 0
    torch.testing.assert_close(logits(found / "merged"), logits(found), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(found / "checkpoints" / "step-000004"), logits(found), rtol=0, atol=1e-5)
    frozen = load_file(world / "lora" / "adapter" / "adapter_model.safetensors")
    saved = load_file(found / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(saved[key][method["rank"] :], frozen[key])


def test_a_stacked_run_resumes_to_the_same_end_unless_the_earlier_adapter_has_changed(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    from ftcli.training.hooks import Checkpoint

    earlier = world / "changing" / "adapter_model.safetensors"
    shutil.copytree(world / "lora" / "adapter", earlier.parent)
    parts = {"init_from": {"path": str(earlier.parent), "adapter": "stack"}}
    whole = train(world, "stack-whole", LORA, **parts)
    path = write_recipe(world, "stack-parts", LORA, **parts)
    original = Checkpoint.after_step

    def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any) -> None:
        if progress.step == 2:
            self.stop.handle(signal.SIGTERM, None)
        original(self, progress, batches, result)

    monkeypatch.setattr(Checkpoint, "after_step", after_step)
    assert run(["train", str(path)]) == 75
    monkeypatch.setattr(Checkpoint, "after_step", original)
    before = earlier.read_bytes()
    save_file({name: tensor + 1 for name, tensor in load_file(earlier).items()}, earlier)
    capsys.readouterr()
    assert run(["train", str(path), "--resume"]) == 2
    assert "cannot resume: `init_from` has changed" in capsys.readouterr().err
    earlier.write_bytes(before)
    assert run(["train", str(path), "--resume"]) == 0
    expected = load_file(whole / "adapter" / "adapter_model.safetensors")
    found = load_file(world / "stack-parts" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("path", ["full", "full/model", "full/checkpoints/step-000004"])
def test_a_whole_model_goes_on_where_it_stood(world: Path, path: str) -> None:
    found = train(world, "on-" + path.replace("/", "-"), {"kind": "full"}, init_from={"path": str(world / path)}, **NO_STEP)
    torch.testing.assert_close(logits(found), logits(world / "full"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "parts", "message"),
    [
        ("lora", {"model": {"base": "OTHER"}}, "base`, and the recipe's base is"),
        ("full", {"model": {"base": "OTHER"}, "method": {"kind": "full"}}, "base`, and the recipe's base is"),
        ("elsewhere-unnoted", {"model": {"base": "OTHER"}}, "base`, and the recipe's base is"),
        ("full", {}, "holds a whole model, and kind `lora` trains an adapter"),
        ("lora", {"method": {"kind": "full"}}, "`ftcli merge` makes a model of it"),
        ("lora", {"method": {**LORA, "alpha": 4.0}}, "`4.0` here, `8.0` in"),
        ("lora", {"method": {**LORA, "rank": 8, "alpha": 8.0}}, "method (r): `8` here, `4` in"),
        ("lora/checkpoints/step-000004", {"method": {**LORA, "variant": "rslora"}}, "method.variant: `rslora` here, `plain` in"),
        ("lora", {"method": {**LORA, "target_modules": ["q_proj"]}}, "without a place in the model"),
        ("lora", {"method": {**LORA, "init": "pissa"}}, "`pissa` would not be used"),
        ("lora", {"method": {"kind": "peft", "type": "loha"}}, "is an adapter of type `lora`, and the method trains one of type `loha`"),
        ("nowhere", {}, "nowhere` does not exist"),
        ("lora/checkpoints/step-4", {}, "did you mean `step-000004`?"),
        ("base", {}, "a model folder goes under `model.base`"),
        ("lora", {"init_from": STACK, "method": {**LORA, "variant": "dora"}}, "`stack` is for"),
        (
            "lora",
            {"init_from": STACK, "method": {**LORA, "target_modules": ["q_proj"]}},
            "layers that get none",
        ),
        ("lora", {"init_from": STACK, "method": {"kind": "ia3"}}, "`stack` is for"),
    ],
)
def test_what_cannot_be_continued_is_refused_with_the_reason(
    world: Path, path: str, parts: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if path == "elsewhere-unnoted" and not (world / path).exists():
        shutil.copytree(world / "lora" / "adapter", world / path)
        (world / path / "base.json").unlink()
    method = parts.pop("method", LORA)
    if parts.get("model"):
        parts = {**parts, "model": {"base": str(world / "other")}}
    found = write_recipe(world, "refused", method, **{"init_from": {"path": str(world / path)}, **parts})
    assert run(["train", str(found)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (world / "refused").exists()
    if "the recipe's base is" in message:
        assert str(world / "base") in said
        assert str(world / "other") in said


def test_a_base_that_was_moved_is_the_same_base(world: Path) -> None:
    shutil.copytree(world / "base", world / "moved")
    found = train(world, "moved-base", LORA, init_from={"path": str(world / "lora")}, model={"base": str(world / "moved")}, **NO_STEP)
    torch.testing.assert_close(logits(found), logits(world / "lora"), rtol=0, atol=1e-5)


def test_a_fingerprint_is_that_of_the_weights_whatever_they_are_loaded_as(world: Path) -> None:
    from ftcli.models.fingerprint import base_fingerprint, is_other_base
    from ftcli.models.load import load_model
    from ftcli.models.quantisation import Quantization
    from ftcli.models.settings import Model

    def of(name: str, **options: Any) -> str:
        return base_fingerprint(load_model(Model(base=str(world / name)), None, **options))

    assert of("base") == of("base", dtype="bfloat16")
    assert is_other_base(of("other"), of("base"))
    assert not is_other_base(of("base", quantization=Quantization()), of("other"))
    assert is_other_base(of("base", quantization=Quantization()), of("other", quantization=Quantization()))


def test_a_run_reads_text_as_the_one_that_it_begins_from(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(world / "base")
    rope = {"kind": "linear", "factor": 2.0}
    train(world, "scaled", LORA, model={"base": base, "rope": rope})
    train(world, "worded", LORA, model={"base": base, "add_tokens": {"tokens": ["xylophonist", "quasarlike"]}})
    tokens = str(world / "worded" / "added_tokens.txt")
    for origin, model, said in (
        ("scaled", {}, "was trained with scaled positions, and the recipe says nothing of them"),
        ("scaled/adapter", {}, "`rope: {kind: linear, factor: 2.0}`"),
        ("worded", {}, f"`add_tokens: {{file: {tokens}}}`"),
        ("worded", {"add_tokens": {"tokens": ["quasarlike", "xylophonist"]}}, "2 of 2 new tokens"),
        ("worded/adapter", {"add_tokens": {"tokens": ["xylophonist"]}}, "1 of 2 new tokens"),
    ):
        path = write_recipe(world, "refused", LORA, init_from={"path": str(world / origin)}, model={"base": base, **model})
        assert run(["train", str(path)]) == 2
        assert said in capsys.readouterr().err
        assert not (world / "refused").exists()
    train(world, "longer", LORA, init_from={"path": str(world / "scaled")}, model={"base": base, "rope": {**rope, "factor": 4.0}})
    train(world, "as-worded", LORA, init_from={"path": str(world / "worded")}, model={"base": base, "add_tokens": {"file": tokens}})
