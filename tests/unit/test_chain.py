"""Chains: stages that begin where the one before ended, stopped anywhere, and reported over all."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import ROOT
from tests.laws.test_resume import process

from ftcli.cli.main import run
from ftcli.errors import RecipeError
from ftcli.methods.lora import Lora
from ftcli.recipe.chain import load_chain
from ftcli.training import chain as chain_module
from ftcli.training.stages import beginning_proofs, read_chain

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LORA = {"kind": "lora", "rank": 4}


def data(name: str, layout: str, **test: Any) -> dict[str, Any]:
    train = {"source": {"kind": "builtin", "name": name}, "format": {"kind": layout}, "limit": 12}
    held = {"source": {"kind": "builtin", "name": name, "split": "test"}, "format": {"kind": layout}, "limit": 4, "name": name}
    return {"train": [train], "evaluation": [held], "max_length": 256, **test}


def stage(name: str, method: dict[str, Any], source: str = "orders", layout: str = "chat", **parts: Any) -> dict[str, Any]:
    return {"name": name, "method": method, "data": data(source, layout), **parts}


STAGES = [
    stage("domain", {"kind": "full"}, "clinic", "text"),
    stage("task", LORA),
    stage("on", LORA, "reviews", "completion"),
    stage("last", {"kind": "ia3"}),
]


def write_chain(folder: Path, stages: list[dict[str, Any]], **parts: Any) -> Path:
    document = {
        "version": 1,
        "name": "chain",
        "model": {"init": {"architecture": "llama", "config": TINY}, "tokenizer": "builtin:tiny"},
        "train": {"steps": 4, "global_batch_size": 3, "lr": 1e-2},
        "every": {"log": 2, "save": 2},
        "stages": stages,
        "output": str(folder / "out"),
        **parts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "chain.yaml"
    path.write_text(json.dumps(document))
    return path


def results(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "out" / "stages").glob("*/*/*.safetensors")):
        if "checkpoints" not in file.parts:
            found |= {f"{file.relative_to(folder)} {name}": tensor for name, tensor in load_file(file).items()}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of four stages: a whole model, an adapter on it, the same adapter trained on, and another kind on the merged model."""
    folder = tmp_path_factory.mktemp("chain")
    assert run(["train", str(write_chain(folder, STAGES))]) == 0
    return folder


def test_each_stage_begins_where_the_one_before_ended(whole: Path) -> None:
    found = read_chain(whole / "out")
    assert [stage["begin"] for stage in found["stages"]] == ["base", "model", "keep", "merge"]
    assert found["status"] == "finished"
    assert len(found["proofs"]) == 3
    assert all(proof["passed"] for proof in found["proofs"])


def test_the_matrix_holds_what_every_stage_measured_of_its_own_and_earlier_sources(whole: Path) -> None:
    matrix = read_chain(whole / "out")["matrix"]
    assert (matrix["stages"], matrix["sources"]) == (["before", "domain", "task", "on", "last"], ["clinic", "orders", "reviews"])
    # The last stage learns what the second has learnt again.
    assert matrix["learnt_at"] == [1, 4, 3]
    known = [[value is not None for value in row] for row in matrix["bits_per_byte"]]
    assert known == [[True, False, False], [True, False, False], [True, True, False], [True, True, True], [True, True, True]]
    own = json.loads((whole / "out" / "stages" / "02-task" / "manifest.json").read_text())["summary"]
    assert matrix["bits_per_byte"][2][1] == own["after"]["orders"]["bits_per_byte"]
    assert own["after"]["clinic"]["role"] == "retained"


def test_a_finished_chain_has_nothing_left_to_do_and_is_not_written_over(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(whole)
    assert run(["train", str(whole / "chain.yaml")]) == 2
    assert "already holds a chain" in capsys.readouterr().err
    assert run(["train", str(whole / "chain.yaml"), "--resume"]) == 0
    after = results(whole)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("moment", ["in a stage", "between stages", "before the merge"])
def test_a_chain_that_was_stopped_ends_bitwise_as_one_that_was_not(
    whole: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftcli.training.hooks import Checkpoint

    original, begun = Checkpoint.after_step, chain_module.run_recipe

    def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any) -> None:
        if progress.step == 3 and "02-task" in str(self.checkpoints.folder):
            self.stop.handle(signal.SIGTERM, None)
        original(self, progress, batches, result)

    def killed(*arguments: Any, **options: Any) -> Any:
        if arguments[0].recipe.name == "on":
            raise KeyboardInterrupt
        return begun(*arguments, **options)

    def killed_merge(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "in a stage":
            patch.setattr(Checkpoint, "after_step", after_step)
        elif moment == "between stages":
            patch.setattr(chain_module, "run_recipe", killed)
        else:
            patch.setattr(chain_module, "_merge_before", killed_merge)
        assert run(["train", str(write_chain(tmp_path, STAGES))]) in (75, 130)
    assert read_chain(tmp_path / "out")["status"] == "running"
    assert run(["train", str(tmp_path / "chain.yaml"), "--resume"]) == 0
    expected, found = results(whole), results(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_a_chain_that_was_killed_ends_bitwise_as_one_that_was_not(whole: Path, tmp_path: Path) -> None:
    """kill -9 inside the first stage, as it ends, inside the second, inside the last."""
    path, stages = write_chain(tmp_path, STAGES), tmp_path / "out" / "stages"

    def until(text: str, file: Path, child: Any) -> bool:
        while child.poll() is None:
            if file.exists() and text in file.read_text():
                return True
            time.sleep(0.005)
        return False

    moments = [
        ('"step": 2,', "01-domain/metrics.jsonl"),
        ('"summary": {', "01-domain/manifest.json"),
        ('"step": 2,', "02-task/metrics.jsonl"),
        ('"step": 1,', "04-last/metrics.jsonl"),
    ]
    for text, name in moments:
        child = process(path, "--resume")
        is_there = until(text, stages / name, child)
        child.kill()
        output, _ = child.communicate()
        assert is_there, output.decode()
    last = process(path, "--resume")
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output.decode()
    expected, found = results(whole), results(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(proof["passed"] for proof in read_chain(tmp_path / "out")["proofs"])


def test_a_smoke_run_goes_through_all_stages_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"epochs": 5, "global_batch_size": 64, "lr": 1e-2}
    path = write_chain(tmp_path, [STAGES[0], {**STAGES[1], "train": {"seed": 3}}, *STAGES[2:]], train=long)
    assert run(["train", str(path), "--smoke", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["smoke"]
    assert [stage["begin"] for stage in found["stages"]] == ["base", "model", "keep", "merge"]
    assert [stage["steps"] for stage in found["stages"]] == [4, 4, 4, 4]
    assert all(proof["passed"] for proof in found["proofs"])
    assert "every stage resumed from its last checkpoint, and proven again" in captured.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chain.yaml"]


def test_a_smoke_run_of_a_chain_takes_a_tiny_model_for_a_base_that_is_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftcli.training.smoke.MAX_BASE_BYTES", 1)
    stages = [stage("task", {**LORA, "rank": 64}), stage("on", {**LORA, "rank": 64}, "reviews", "completion", train={"seed": 3})]
    path = write_chain(tmp_path, [*stages, STAGES[0]], model={"base": "builtin:tiny"})
    assert run(["train", str(path), "--smoke"]) == 0
    said = capsys.readouterr().out
    assert "a tiny llama with random weights stands in for builtin:tiny" in said
    assert said.endswith("ok: the smoke run of chain.yaml went through; its folder is removed\n")


def test_stages_on_one_adapter_share_the_tokens_that_the_first_has_found(tmp_path: Path) -> None:
    model = {"base": "builtin:tiny", "add_tokens": {"mine": 3, "train": "all"}}
    loaded = load_chain(write_chain(tmp_path, [stage("a", LORA), stage("b", LORA), stage("c", LORA)], model=model))
    found = [one.loaded.recipe.model.add_tokens for one in loaded.stages]
    assert [one and (one.mine, one.file, one.train) for one in found] == [
        (3, None, "all"),
        *[(None, str(tmp_path / "out" / "stages" / "01-a" / "added_tokens.txt"), "all")] * 2,
    ]


def test_a_stage_that_begins_elsewhere_is_caught(whole: Path) -> None:
    found = read_chain(whole / "out")
    summaries = [json.loads((Path(stage["folder"]) / "manifest.json").read_text())["summary"] for stage in found["stages"]]
    summaries[2]["before"]["orders"]["loss"] += 0.1
    proofs = beginning_proofs([stage["name"] for stage in found["stages"]], summaries)
    assert [proof["passed"] for proof in proofs] == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [stage("a", LORA), stage("a", LORA)]}, "stages.1.name (line 1"),
        ({"stages": [stage("a", {"kind": "lroa"})]}, "did you mean `lora`?"),
        ({"stages": [{"name": "a"}]}, "missing key `data`"),
        ({"stages": []}, "stages"),
        ({"stages": [stage("a", LORA, begin="keep")]}, "the first stage begins at `model`"),
        ({"stages": [stage("a", LORA), stage("b", {"kind": "ia3"}, begin="keep")]}, "`ia3` cannot train an adapter of `lora` on"),
        ({"stages": [stage("a", {"kind": "prompt"}), stage("b", LORA)]}, "cannot be merged"),
        ({"stages": [stage("a", LORA, train={"steps": 3, "epochs": 2.0})]}, "stages.0.train"),
    ],
)
def test_what_is_wrong_with_any_stage_is_said_at_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_chain(write_chain(tmp_path, **{"stages": STAGES, **change}))
    assert message in str(caught.value)


def test_rows_of_the_last_stage_are_looked_at_before_the_first_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chain(tmp_path, [*STAGES[:1], stage("wrong", LORA, data=data("clinic", "completion", evaluation=[]))])
    assert run(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "stage `wrong`: " in said
    assert "column `prompt` is not there" in said
    assert not (tmp_path / "out").exists()
    assert run(["check", "--fast", str(path)]) == 2


def test_stages_that_changed_are_not_gone_on_with(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chain(tmp_path, [STAGES[0], stage("other", LORA)], output=str(whole / "out"))
    assert run(["train", str(path), "--resume"]) == 2
    assert "the stages have changed" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("chain-*.yaml")), ids=lambda path: path.name)
def test_every_chain_of_the_project_passes_the_check(path: Path) -> None:
    assert run(["check", "--fast", str(path)]) == 0


def test_a_stage_takes_its_own_keys_and_the_others_from_the_chain(tmp_path: Path) -> None:
    shared = {**data("orders", "chat"), "max_length": 300}
    stages = [
        {"name": "a", "train": {"lr": 1e-4}, "every": {"log": 1}},
        {
            "name": "b",
            "train": {"epochs": 2.0},
            "data": {"train": shared["train"], "max_length": 200},
            "method": {"kind": "lora", "alpha": 3.0},
        },
    ]
    loaded = load_chain(write_chain(tmp_path, stages, data=shared, method={"kind": "lora", "rank": 2}))
    first, second = (stage.loaded.recipe for stage in loaded.stages)
    assert (first.train.lr, first.train.steps, first.train.global_batch_size) == (1e-4, 4, 3)
    assert (first.every.log, first.every.save) == (1, 2)
    assert (second.train.lr, second.train.steps, second.train.epochs) == (1e-2, None, 2.0)
    measured = tuple(source.model_copy(update={"max_length": 300}) for source in first.data.evaluation)
    assert (second.data.max_length, second.data.evaluation) == (200, measured)
    assert (first.method.rank, second.method.rank, second.method.alpha) == (2, Lora().rank, 3.0)


def test_a_source_that_two_stages_measure_is_measured_once(tmp_path: Path) -> None:
    again = {**STAGES[0]["data"]["evaluation"][0], "role": "retained"}
    second = stage("second", LORA)
    second["data"]["evaluation"].append(again)
    loaded = load_chain(write_chain(tmp_path, [STAGES[0], second], evaluation=[again]))
    assert [[source.name for source in stage.loaded.recipe.data.evaluation] for stage in loaded.stages] == [
        ["clinic"],
        ["orders", "clinic"],
    ]


def test_a_stage_that_failed_can_be_begun_anew_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    path = write_chain(tmp_path, STAGES[:2])
    assert run(["train", str(path), "--set", "stages.1.train={lr: 1e30}"]) == 1
    capsys.readouterr()
    assert run(["train", str(path), "--resume"]) == 2
    said = capsys.readouterr().err
    folder = tmp_path / "out" / "stages" / "02-task"
    assert f"remove {folder}" in said
    shutil.rmtree(folder)
    assert run(["train", str(path), "--resume"]) == 0
