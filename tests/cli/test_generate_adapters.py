"""`ftcli generate BASE --adapter NAME=DIR ...`: one base in memory, and every prompt answered by the adapter it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcli.cli.main import run
from ftcli.exporting.open_target import open_adapters, open_target

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2},
    "other": {"kind": "lora", "rank": 3, "variant": "dora", "extra_trained_modules": ["norm"]},
    "rotated": {"kind": "peft", "type": "oft"},
    "scaled": {"kind": "ia3"},
    "budgeted": {"kind": "adalora", "rank": 2, "initial_rank": 4},
}
IDS = torch.randint(4, 3000, (2, 12), generator=torch.Generator().manual_seed(1))
PROMPTS = ["Once upon a time", "The cat sat", "Two red apples"]
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, and adapters of several kinds on the first, as runs leave them and as PEFT does."""
    from ftcli.methods.context import AttachContext
    from ftcli.models.fingerprint import base_fingerprint, note_base
    from ftcli.models.load import load_model, save_model
    from ftcli.models.settings import Init, Model
    from ftcli.models.tokenizer import load_tokenizer
    from ftcli.recipe.load import load_recipe

    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = load_tokenizer("builtin:tiny")
    for seed, name in enumerate(["base", "stranger"]):
        # Large weights, so that a small change of them changes the answer.
        init = Init(architecture="llama", config={**TINY, "initializer_range": 0.2})
        save_model(load_model(Model(init=init, tokenizer="builtin:tiny"), tokenizer, seed=seed), tokenizer, folder / name)
    for name, method in METHODS.items():
        recipe = {"version": 1, "name": name, "model": {"base": str(folder / "base")}, "method": method}
        document = {**recipe, "data": {"train": [{"source": {"kind": "builtin", "name": "orders"}}]}}
        (folder / f"{name}.yaml").write_text(json.dumps(document))
        settings = load_recipe(folder / f"{name}.yaml").recipe.method
        base = load_model(Model(base=str(folder / "base")), tokenizer, dtype="float32")
        fingerprint = base_fingerprint(base)
        module = settings.attach(base, AttachContext(seed=5))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        settings.save(module, folder / name)
        if name != "other":
            note_base(folder / name, str(folder / "base"), fingerprint)
    return folder


def options(world: Path, *names: str) -> list[str]:
    return [part for name in names for part in ("--adapter", f"{name}={world / name}")]


def answers(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert run(["generate", *arguments, "--json", "--max-new-tokens", "8", "--device", "cpu"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["answers"]
    return found


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module(IDS).logits
    return found


def test_every_adapter_computes_what_it_does_alone_in_whatever_order_they_are_used(world: Path) -> None:
    opened = open_adapters(str(world / "base"), {name: str(world / name) for name in METHODS}, device="cpu")
    alone = {name: logits(open_target(str(world / name), device="cpu").model) for name in METHODS}
    alone["base"] = logits(open_target(str(world / "base"), device="cpu").model)
    assert list(opened.adapters.names) == ["base", *METHODS]
    for name in ["scaled", "base", *METHODS, "base", "budgeted", "lora", "rotated"]:
        assert torch.equal(logits(opened.adapters.use(name)), alone[name]), name
    values = list(alone.values())
    assert all(not torch.equal(first, second) for i, first in enumerate(values) for second in values[:i])


def test_adapters_share_one_base(world: Path) -> None:
    opened = open_adapters(str(world / "base"), {name: str(world / name) for name in ("lora", "rotated")}, device="cpu")
    pointers = []
    for name in ("lora", "rotated", "base"):
        weights = dict(opened.adapters.use(name).named_parameters())
        for part in ("embed_tokens", "layers.0.self_attn.q_proj"):
            found = [weight for key, weight in weights.items() if part in key and key.endswith("weight") and "lora" not in key]
            pointers.append(found[0].data_ptr())
    assert len(set(pointers)) == 2


def test_each_prompt_is_answered_by_the_adapter_it_names(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": text, "adapter": name} for text in PROMPTS for name in ("lora", "rotated", "base")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plain.txt").write_text("".join(f"{text}\n" for text in PROMPTS))
    found = answers(
        capsys, str(world / "base"), "--prompt-file", str(tmp_path / "prompts.jsonl"), "--raw", *options(world, "lora", "rotated")
    )
    assert [row["adapter"] for row in found] == [row["adapter"] for row in rows]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    for name in ("lora", "rotated", "base"):
        alone = answers(capsys, str(world / name), "--prompt-file", str(tmp_path / "plain.txt"), "--raw")
        assert [row["answer"] for row in found if row["adapter"] == name] == [row["answer"] for row in alone], name


def test_one_adapter_answers_all_and_use_chooses_for_prompts_that_name_none(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(world / "base")
    assert answers(capsys, base, PROMPTS[0], "--raw", *options(world, "lora"))[0]["adapter"] == "lora"
    both = options(world, "lora", "rotated")
    by_use = {name: answers(capsys, base, PROMPTS[0], "--raw", *both, "--use", name)[0] for name in ("lora", "rotated", "base")}
    assert {name: row["adapter"] for name, row in by_use.items()} == {name: name for name in by_use}
    assert len({row["answer"] for row in by_use.values()}) == 3
    assert run(["generate", base, PROMPTS[0], "--raw", "--adapter", str(world / "lora"), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == by_use["lora"]["answer"].strip()


@pytest.mark.parametrize(
    ("target", "extra", "message"),
    [
        ("base", ["lora=lora", "rotated=rotated"], "prompt 1 names no adapter, and several are given"),
        ("base", ["lora=lora", "lora=rotated"], "two adapters are called so"),
        ("base", ["base=lora"], "this is the model without an adapter"),
        ("base", ["=lora"], "neither a name nor a folder may be empty"),
        ("base", ["lora=nowhere"], "nowhere` does not exist"),
        ("stranger", ["lora=lora"], "/base`, and this base is"),
        ("stranger", ["other=other"], "/base`, and this base is"),
        ("lora", ["lora=lora"], "is no plain model"),
    ],
)
def test_what_does_not_fit_is_refused(
    target: str, extra: list[str], message: str, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    given = [part for name in extra for part in ("--adapter", name)]
    assert run(["generate", str(world / target), "Hello", "--raw", *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_choice_of_what_is_not_given_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Hello", "adapter": "lroa"}) + "\n")
    base, file = str(world / "base"), str(tmp_path / "prompts.jsonl")
    assert run(["generate", base, "--prompt-file", file, *options(world, "lora")]) == 2
    assert "did you mean `lora`?" in capsys.readouterr().err
    assert run(["generate", base, "--prompt-file", file]) == 2
    assert "a prompt names the adapter `lroa`, and none is given" in capsys.readouterr().err
    assert run(["generate", base, "Hello", *options(world, "lora"), "--use", "lor"]) == 2
    assert "did you mean `lora`?" in capsys.readouterr().err
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Hello", "adapter": 3}) + "\n")
    assert run(["generate", base, "--prompt-file", file, *options(world, "lora")]) == 2
    assert "`adapter` is 3, and not the name of one" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "lora", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first][:1].clone()}, tmp_path / "broken" / "adapter_model.safetensors")
    assert run(["generate", str(world / "base"), "Hello", "--raw", "--adapter", f"broken={tmp_path / 'broken'}"]) == 2
    assert "of another shape" in capsys.readouterr().err
