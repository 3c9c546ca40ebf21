"""What cannot hold a run is said before anything is trained or written, and what a stage will leave can be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli.main import run
from ftcli.errors import Problem, RecipeError, RequestError
from ftcli.recipe.chain import load_chain
from ftcli.recipe.load import load_recipe

CONFIG = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
STORIES = {"source": {"kind": "builtin", "name": "stories"}, "format": {"kind": "text"}}
FULL, LORA = {"kind": "full"}, {"kind": "lora", "rank": 2}


def data(name: str = "orders") -> dict[str, Any]:
    return {"train": [{"source": {"kind": "builtin", "name": name}, "limit": 5}], "holdout": 0, "max_length": 256}


def ewc(**changes: Any) -> dict[str, Any]:
    return {"kind": "ewc", "examples": 1, "rows": {**STORIES, "source": {**STORIES["source"], "split": "test"}}, **changes}


def objective(*regularizers: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "causal-lm", "regularize": regularizers}


def write(folder: Path, name: str, *regularizers: dict[str, Any], **changes: Any) -> str:
    document = {
        "version": 1,
        "name": name,
        "model": {"init": {"architecture": "llama", "config": CONFIG}, "tokenizer": "builtin:tiny"},
        "data": data(),
        "method": FULL,
        "objective": objective(*regularizers),
        "train": {"steps": 1, "global_batch_size": 2, "lr": 1e-2},
        "output": str(folder / name),
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return str(path)


def write_chain(folder: Path, stages: list[dict[str, Any]], **changes: Any) -> str:
    document = {
        "version": 1,
        "name": "chain",
        "model": {"init": {"architecture": "llama", "config": CONFIG}, "tokenizer": "builtin:tiny"},
        "data": data(),
        "train": {"steps": 1, "global_batch_size": 2, "lr": 1e-2},
        "stages": stages,
        "output": "out",
        **changes,
    }
    path = folder / "chain.yaml"
    path.write_text(json.dumps(document))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with `ewc`, of a whole model and of an adapter on it, and a model of another vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("held")
    LlamaForCausalLM(LlamaConfig(vocab_size=99, **CONFIG)).save_pretrained(folder / "stranger")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTCLI_CACHE", str(folder / "cache"))
        assert run(["train", write(folder, "first", ewc())]) == 0
        on_it = {"base": str(folder / "first" / "model")}
        assert run(["train", write(folder, "adapter", ewc(), method=LORA, model=on_it)]) == 0
    return folder


WRONG = {
    "role of kl": ({"kind": "kl", "on": "replay"}, "no training source has `role: replay`"),
    "nothing to measure on": ({"kind": "ewc"}, "no training source has `role: replay` to measure on"),
    "no file": (ewc(rows={"source": {"kind": "file", "path": "nowhere.jsonl"}}), "there is no such file"),
    "no column": (ewc(rows={**STORIES, "format": {"kind": "text", "text": "nothing"}}), "column `nothing` is not there"),
    "no earlier run": (ewc(earlier="nowhere"), "has no fisher.safetensors"),
    "no teacher": ({"kind": "kl", "teacher": "./nowhere"}, "is no folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_hold_is_said_before_anything_is_written(world: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    regularizer, words = WRONG[name]
    path = write(world, "wrong", regularizer, {"kind": "l2_sp"})
    for command in (["check", "--fast"], ["check"], ["train"]):
        assert run([*command, path]) == 2, command
        assert words in capsys.readouterr().err, command
        assert not (world / "wrong").exists()


def test_all_that_is_wrong_is_said_at_once(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    regularizers = (ewc(rows=WRONG["no file"][0]["rows"], earlier="nowhere"), {"kind": "kl", "teacher": "./nowhere"})
    assert run(["check", "--fast", write(world, "wrong", *regularizers)]) == 2
    said = capsys.readouterr().err
    assert [said.count(words) for words in ("no such file", "no fisher.safetensors", "is no folder")] == [1, 1, 1]


def test_a_teacher_of_another_vocabulary_is_refused_with_and_without_the_model(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = {"kind": "kl", "teacher": "stranger"}
    for command, model in ((["check"], {}), (["check", "--fast"], {"model": {"base": "builtin:tiny"}})):
        assert run([*command, write(world, "wrong", stranger, **model)]) == 2
        assert "stranger` predicts 99 tokens and the model" in capsys.readouterr().err


def test_a_run_that_is_refused_at_the_last_moment_leaves_its_place_free(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.training import run as run_module

    def refuse(*_: Any) -> Any:
        raise RequestError("no", [Problem("here", "it does not fit")])

    path = write(world, "late", {"kind": "l2_sp"})
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "assemble_learner", refuse)
        assert run(["train", path]) == 2
    assert not (world / "late").exists()
    assert run(["train", path]) == 0


# ---- whose Fisher information it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "is_taken"),
    [
        ({}, True),
        ({"model": {"base": "first/model"}}, True),
        ({"init_from": {"path": "first"}}, True),
        ({"train": {"steps": 1, "global_batch_size": 2, "lr": 1e-2, "seed": 3}}, False),
        ({"model": {"base": "copy"}}, False),
    ],
    ids=["the same start", "its model", "init_from", "another start", "another model"],
)
def test_only_the_fisher_information_of_ones_own_weights_is_taken(
    world: Path, changes: dict[str, Any], is_taken: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    if not (world / "copy").exists():
        import shutil

        shutil.copytree(world / "first" / "model", world / "copy")
        model = AutoModelForCausalLM.from_pretrained(world / "copy")
        torch.nn.init.normal_(model.model.embed_tokens.weight)
        model.save_pretrained(world / "copy")
    path = write(world, "next", ewc(earlier="first"), **changes)
    assert run(["check", path]) == (0 if is_taken else 2)
    assert ("began with other weights" in capsys.readouterr().err) is not is_taken


@pytest.mark.parametrize(
    ("seed", "init_from", "is_taken"), [(17, None, True), (3, None, False), (3, "adapter", True)], ids=["drawn alike", "drawn anew", "kept"]
)
def test_an_adapter_takes_that_of_the_same_draw(
    world: Path, seed: int, init_from: str | None, is_taken: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {} if init_from is None else {"init_from": {"path": init_from}}
    train = {"steps": 1, "global_batch_size": 2, "lr": 1e-2, "seed": seed}
    path = write(world, "next", ewc(earlier="adapter"), method=LORA, model={"base": "first/model"}, train=train, **changes)
    assert run(["check", path]) == (0 if is_taken else 2), capsys.readouterr().err


# ---- chains ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [[], [{"name": "between", "method": LORA}]], ids=["at once", "past an adapter"])
def test_a_stage_is_held_by_what_a_stage_before_will_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: list[dict[str, Any]]
) -> None:
    before = "out/stages/01-one"
    held = objective(ewc(earlier=before), {"kind": "kl", "teacher": f"{before}/model", "weight": 0.5})
    stages = [{"name": "one", "method": FULL, "objective": objective(ewc())}, *between, {"name": "two", "method": FULL, "objective": held}]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write_chain(tmp_path, stages)
    assert run(["check", path]) == 0
    assert run(["train", path, "--smoke"]) == 0
    assert run(["train", path]) == 0
    assert (tmp_path / "out" / "stages" / f"0{2 + len(between)}-two" / "fisher.safetensors").is_file()
    assert run(["train", path, "--resume"]) == 0


@pytest.mark.parametrize(
    ("regularizer", "words"),
    [
        ({"kind": "kl", "teacher": "out/stages/02-two/model"}, "is no model that a stage before leaves"),
        ({"kind": "kl", "teacher": "out/stages/01-one/adapter"}, "is no model that a stage before leaves"),
        (ewc(earlier="out/stages/01-one"), "is no stage before with `ewc` on what trains here"),
    ],
    ids=["itself", "an adapter", "without ewc"],
)
def test_what_no_stage_will_leave_is_refused(tmp_path: Path, regularizer: dict[str, Any], words: str) -> None:
    stages = [{"name": "one", "method": LORA}, {"name": "two", "method": LORA, "objective": objective(regularizer)}]
    with pytest.raises(RecipeError) as caught:
        load_chain(Path(write_chain(tmp_path, stages)))
    assert words in str(caught.value)
    assert "stages.1.objective.regularize.0" in str(caught.value)


def test_rows_that_hold_the_last_stage_are_looked_at_before_the_first_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_chain(
        tmp_path, [{"name": "one", "method": FULL}, {"name": "two", "method": FULL, "objective": objective(WRONG["no file"][0])}]
    )
    for command in ("check", "train"):
        assert run([command, path]) == 2
        assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reference_with_more_than_one_slash_is_a_folder_of_the_recipe(tmp_path: Path) -> None:
    found = [
        load_recipe(Path(write(tmp_path, "held", {"kind": "kl", "teacher": teacher}))).recipe.objective.regularize[0]
        for teacher in ("runs/one/model", "owner/name", "base")
    ]
    assert [entry.teacher for entry in found] == [str(tmp_path / "runs" / "one" / "model"), "owner/name", "base"]  # type: ignore[union-attr]
