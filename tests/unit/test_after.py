"""Lifelong training: `--after RUN` goes on from it, replays a sample of all earlier data, and extends the matrix of results."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftcli.cli.main import run
from ftcli.data.buffer import Kept, fill_buffer, proportional, read_buffer
from ftcli.data.settings import TrainSource

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LORA = {"kind": "lora", "rank": 4}


def write_recipe(folder: Path, name: str, method: dict[str, Any], source: str, layout: str, **parts: Any) -> Path:
    one = {"kind": "builtin", "name": source}
    document = {
        "version": 1,
        "name": name,
        "model": {"base": str(folder / "base")},
        "data": {
            "train": [{"source": one, "format": {"kind": layout}, "limit": 12}],
            "evaluation": [{"source": {**one, "split": "test"}, "format": {"kind": layout}, "limit": 4, "name": source}],
            "max_length": 256,
        },
        "method": method,
        "train": {"steps": 4, "global_batch_size": 4, "lr": 1e-2},
        "every": {"log": 2, "save": 2},
        "output": str(folder / name),
        **parts,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: an adapter, the same trained on with other data, and everything on the merged model."""
    from ftcli.models.load import load_model, save_model
    from ftcli.models.settings import Init, Model
    from ftcli.models.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("life")
    tokenizer = load_tokenizer("builtin:tiny")
    model = load_model(Model(init=Init(architecture="llama", config=TINY), tokenizer="builtin:tiny"), tokenizer, seed=3)
    save_model(model, tokenizer, folder / "base")
    steps = [("first", LORA, "orders", "chat"), ("second", LORA, "clinic", "text"), ("third", {"kind": "full"}, "reviews", "completion")]
    before: list[str] = []
    for name, method, source, layout in steps:
        path = write_recipe(folder, name, method, source, layout)
        assert run(["train", str(path), *before, "--replay-rows", "8"]) == 0
        before = ["--after", str(folder / name)]
    return folder


def manifest(run_folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_folder / "manifest.json").read_text())
    return found


def test_every_run_begins_where_the_one_before_ended(life: Path) -> None:
    found = json.loads((life / "third" / "stages.json").read_text())
    assert [Path(path).name for path in found["runs"]] == ["first", "second", "third"]
    assert [proof["passed"] for proof in found["proofs"]] == [True, True]
    assert manifest(life / "second")["init_from"]["path"] == str(life / "first")
    assert manifest(life / "third")["base"] == str(life / "second" / "merged")


def test_the_matrix_grows_with_every_run(life: Path) -> None:
    matrix = json.loads((life / "third" / "stages.json").read_text())["matrix"]
    assert (matrix["sources"], matrix["learnt_at"]) == (["orders", "clinic", "reviews"], [1, 2, 3])
    known = [[value is not None for value in row] for row in matrix["bits_per_byte"]]
    assert known == [[True, False, False], [True, False, False], [True, True, False], [True, True, True]]


def test_the_buffer_holds_a_sample_of_all_earlier_data_of_bounded_size(life: Path) -> None:
    kept = read_buffer(life / "second" / "replay-8")
    assert [(entry.source.name, entry.seen) for entry in kept] == [("orders of first", 12), ("clinic of second", 12)]
    assert [len(list(entry.source.source.rows())) for entry in kept] == [4, 4]
    roles = [(report["name"], report["role"]) for report in manifest(life / "third")["data"]][:3]
    assert roles == [("reviews", "new"), ("orders of first", "replay"), ("clinic of second", "replay")]


def test_a_source_that_both_runs_measure_is_measured_once(life: Path) -> None:
    path = write_recipe(life, "same", LORA, "orders", "chat")
    assert run(["train", str(path), "--after", str(life / "first"), "--replay-rows", "0"]) == 0
    assert list(manifest(life / "same")["summary"]["after"]) == ["orders"]


def test_a_run_that_was_stopped_ends_bitwise_as_one_that_was_not(life: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.training.hooks import Checkpoint

    original = Checkpoint.after_step

    def after_step(self: Checkpoint, progress: Any, batches: Any, result: Any) -> None:
        if progress.step == 3:
            self.stop.handle(signal.SIGTERM, None)
        original(self, progress, batches, result)

    path = write_recipe(life, "again", LORA, "clinic", "text")
    command = ["train", str(path), "--after", str(life / "first"), "--replay-rows", "8"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "after_step", after_step)
        assert run(command) == 75
    assert run([*command, "--resume"]) == 0
    expected, found = (load_file(life / name / "adapter" / "adapter_model.safetensors") for name in ("second", "again"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("parts", "after", "message"),
    [
        ({"model": {"base": "builtin:tiny"}}, "first", "name the same base"),
        ({"init_from": {"path": "first"}}, "first", "--after says where the run begins"),
        ({}, "nowhere", "is no run folder"),
        ({}, "unfinished", "is not finished"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(
    life: Path, parts: dict[str, Any], after: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (life / "unfinished").mkdir(exist_ok=True)
    (life / "unfinished" / "manifest.json").write_text('{"status": "failed", "name": "unfinished"}')
    path = write_recipe(life, "refused", LORA, "clinic", "text", **parts)
    assert run(["train", str(path), "--after", str(life / after)]) == 2
    assert message in capsys.readouterr().err
    assert not (life / "refused").exists()


def rows_file(path: Path, count: int, word: str) -> TrainSource:
    path.write_text("".join(json.dumps({"text": f"{word} {index}"}) + "\n" for index in range(count)))
    return TrainSource.model_validate_json(json.dumps({"source": {"kind": "file", "path": str(path)}, "format": {"kind": "text"}}))


def test_every_row_ever_seen_has_the_same_chance_to_be_kept(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    first, second = rows_file(tmp_path / "a.jsonl", 30, "a"), rows_file(tmp_path / "b.jsonl", 10, "b")
    for seed in range(200):
        one = fill_buffer([first], [], tmp_path / f"one-{seed}", 12, seed, "")
        both = fill_buffer([second], one, tmp_path / f"both-{seed}", 12, seed, "")
        counts.update(row["text"] for entry in both for _, row in entry.source.source.rows())
    assert sum(counts.values()) == 200 * 12
    chances = [counts[f"a {index}"] / 200 for index in range(30)] + [counts[f"b {index}"] / 200 for index in range(10)]
    # 0.3 each; the standard deviation of one of 200 draws is 0.032
    assert max(abs(chance - 0.3) for chance in chances) < 0.13


def test_a_buffer_is_the_same_for_the_same_seed_and_another_for_another(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "a.jsonl", 50, "a")

    def texts(name: str, seed: int) -> list[str]:
        return [row["text"] for kept in fill_buffer([source], [], tmp_path / name, 5, seed, "") for _, row in kept.source.source.rows()]

    assert texts("x", 1) == texts("y", 1) != texts("z", 2)
    assert read_buffer(tmp_path / "x") == [Kept(50, read_buffer(tmp_path / "x")[0].source)]


def test_parts_are_in_proportion_and_nobody_gives_more_than_it_has() -> None:
    assert proportional(7, [100, 100, 100]) == [3, 2, 2]
    assert proportional(100, [1, 5]) == [1, 5]
    assert sum(proportional(13, [7, 90, 4, 31])) == 13
