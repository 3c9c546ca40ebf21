"""Lifelong training: `--after RUN` goes on from it, replays a sample of all earlier data, and extends the matrix of results."""

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
from ftcli.data.buffer import read_buffer
from ftcli.data.holdout import held_out
from ftcli.data.settings import TrainSource
from ftcli.errors import RequestError, UsageError
from ftcli.models.settings import Model
from ftcli.recipe.load import load_recipe
from ftcli.recipe.recipe import Recipe
from ftcli.reporting.live import Reporter
from ftcli.training.after import _excuse_rescaled, follow

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


def write_base(folder: Path) -> None:
    """folder/base, a tiny random model."""
    from ftcli.models.load import load_model, save_model
    from ftcli.models.settings import Init, Model
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("builtin:tiny")
    model = load_model(Model(init=Init(architecture="llama", config=TINY), tokenizer="builtin:tiny"), tokenizer, seed=3)
    save_model(model, tokenizer, folder / "base")


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: an adapter, the same trained on with other data, and everything on the merged model."""
    folder = tmp_path_factory.mktemp("life")
    write_base(folder)
    steps: list[tuple[str, dict[str, Any], str, str]] = [
        ("first", LORA, "orders", "chat"),
        ("second", LORA, "clinic", "text"),
        ("third", {"kind": "full"}, "reviews", "completion"),
    ]
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
    assert [entry.source.name for entry in kept.sources] == ["orders of first", "clinic of second"]
    assert kept.num_rows == 8
    roles = [(report["name"], report["role"]) for report in manifest(life / "third")["data"]][:3]
    assert roles == [("reviews", "new"), ("orders of first", "replay"), ("clinic of second", "replay")]


def test_a_source_that_both_runs_measure_is_measured_once(life: Path) -> None:
    found, _ = followed(write_recipe(life, "same", LORA, "orders", "chat"), life / "first", 0)
    assert [(source.name, source.role) for source in found.data.evaluation] == [("orders", "target")]
    assert len(found.data.train) == 1


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


def sampled(entries: Any) -> list[str]:
    return [row["text"] for entry in entries if entry.num_rows for _, row in entry.source.source.rows()]


def followed(recipe: Path, after: Path, replay_rows: int = 8) -> tuple[Recipe, str]:
    """The recipe as it goes on, and what was said."""
    said: list[str] = []

    class Said(Reporter):
        def note(self, text: str) -> None:
            said.append(text)

    return follow(load_recipe(recipe, follows=True), after, replay_rows, Said()).recipe, "\n".join(said)


def test_a_life_of_whole_models_goes_on_from_the_base_that_it_began_with(life: Path) -> None:
    path = write_recipe(life, "fourth", {"kind": "full"}, "orders", "chat")
    found, _ = followed(path, life / "third")
    assert found.model.base == str(life / "third" / "model")
    direct = write_recipe(life, "direct", {"kind": "full"}, "orders", "chat", model={"base": str(life / "second" / "merged")})
    assert followed(direct, life / "third")[0].model == found.model


def text_recipe(folder: Path, name: str, sources: list[dict[str, Any]], **parts: Any) -> Path:
    data = {"train": sources, "max_length": 64, **parts.pop("data", {})}
    return write_recipe(folder, name, parts.pop("method", {"kind": "full"}), "orders", "chat", data=data, **parts)


@pytest.fixture(scope="module")
def held(life: Path) -> Path:
    """A run with a new token that holds rows out by itself and sees few of the others."""
    rows_file(life / "words.jsonl", 60, "word")
    rows_file(life / "more.jsonl", 60, "more")
    model = {"base": str(life / "base"), "add_tokens": {"tokens": ["zebra"]}}
    assert run(["train", str(text_recipe(life, "held", [file_of(life / "words.jsonl")], model=model))]) == 0
    return life


def file_of(path: Path, **settings: Any) -> dict[str, Any]:
    return {"source": {"kind": "file", "path": str(path)}, "format": {"kind": "text"}, **settings}


def test_rows_held_out_or_never_seen_are_not_replayed_and_go_on_being_measured(held: Path) -> None:
    path = text_recipe(held, "held2", [file_of(held / "more.jsonl")])
    assert run(["train", str(path), "--after", str(held / "held"), "--replay-rows", "100"]) == 0
    rows = [json.loads(line) for line in (held / "words.jsonl").read_text().splitlines()]
    resting = {rows[place]["text"] for place in held_out(rows, 0.05).places}
    kept = sampled(read_buffer(held / "held" / "replay-100").sources)
    assert len(kept) == 16
    assert not resting & set(kept)
    matrix = json.loads((held / "held2" / "stages.json").read_text())["matrix"]
    assert (matrix["sources"], matrix["learnt_at"]) == (["words-holdout", "more-holdout"], [1, 2])
    assert [[value is not None for value in row] for row in matrix["bits_per_byte"]] == [[True, False], [True, False], [True, True]]
    assert json.loads((held / "held2" / "stages.json").read_text())["proofs"][0]["passed"] is True


def test_the_share_of_replay_is_split_so_that_every_row_of_the_buffer_counts_alike(held: Path) -> None:
    (held / "long.jsonl").write_text("".join(json.dumps({"text": f"{'long ' * 20}{index}"}) + "\n" for index in range(10)))
    both = text_recipe(held, "both", [file_of(held / "long.jsonl"), file_of(held / "more.jsonl")], train={"epochs": 1, "lr": 1e-3})
    assert run(["train", str(both)]) == 0
    path = text_recipe(held, "both2", [file_of(held / "words.jsonl")], train={"steps": 60, "global_batch_size": 4, "lr": 1e-3})
    found, _ = followed(path, held / "both", 35)
    from ftcli.training.assemble import assemble_data

    order = assemble_data(found, None).order
    passes = order.repeats()[1:]
    assert len(passes) == 2
    assert passes[0] == pytest.approx(passes[1], rel=0.1)
    shares = write_recipe(held, "both3", {"kind": "full"}, "orders", "chat", data={
        "train": [file_of(held / "words.jsonl")], "max_length": 64, "mixture": {"kind": "shares"}})  # fmt: skip
    passes = assemble_data(followed(shares, held / "both", 35)[0], None).order.repeats()[1:]
    assert passes[0] == pytest.approx(passes[1], rel=0.1)


def test_the_share_of_replay_is_the_recipes_to_say(held: Path) -> None:
    mixture = {"mixture": {"kind": "replay", "share_of_new": 0.9}}
    path = text_recipe(held, "share", [file_of(held / "more.jsonl")], data=mixture)
    found, _ = followed(path, held / "held", 10)
    assert found.data.mixture.model_dump()["share_of_new"] == 0.9
    assert [source.role for source in found.data.train] == ["new", "replay"]
    assert run(["check", "--fast", str(path), "--after", str(held / "held"), "--replay-rows", "10"]) == 0
    assert run(["check", "--fast", str(path), "--after", str(held / "held"), "--replay-rows", "0"]) == 2
    assert run(["check", "--fast", str(path)]) == 2


def test_a_buffer_that_cannot_be_fair_and_larger_says_so(held: Path) -> None:
    found, said = followed(
        text_recipe(held, "larger", [file_of(held / "words.jsonl")], method=LORA, data={"max_length": 256}), held / "second", 30
    )
    num_rows = sum(len(list(source.source.rows())) for source in found.data.train[1:])
    assert 8 <= num_rows < 20
    assert f"{num_rows} rows are replayed, not 30" in said


def test_texts_that_the_base_wrote_are_replayed_like_others(held: Path) -> None:
    own = {"source": {"kind": "self", "tokens": 200, "max_length": 16, "beginnings": ["a"]}, "role": "replay", "name": "own"}
    path = text_recipe(held, "self", [file_of(held / "words.jsonl"), own])
    assert run(["train", str(path)]) == 0
    found, _ = followed(text_recipe(held, "self2", [file_of(held / "more.jsonl")]), held / "self", 12)
    assert [source.name for source in found.data.train[1:]] == ["words of self", "own of self"]
    assert all(source.source.kind == "file" for source in found.data.train)


def test_what_the_next_recipe_adds_to_the_base_is_added_to_what_became_of_it(held: Path) -> None:
    words = {"add_tokens": {"tokens": ["lynx", "wombat"]}}
    base = {"base": str(held / "base")}
    path = text_recipe(held, "grown", [file_of(held / "more.jsonl")], model={**base, **words})
    found, _ = followed(path, held / "held")
    assert found.model.add_tokens is not None
    assert found.model.add_tokens.tokens == (" lynx", " wombat")
    lora = write_recipe(held, "lora-words", LORA, "orders", "chat", model={**base, **words})
    found, said = followed(lora, held / "first")
    assert found.init_from is None
    assert found.model.base == str(held / "first" / "merged")
    assert found.model.add_tokens is not None
    assert "`model.add_tokens`: on the base with the earlier adapter merged" in said


def test_what_the_earlier_run_has_added_is_not_added_again(held: Path) -> None:
    model = {"base": str(held / "base"), "add_tokens": {"tokens": ["zebra", "wombat"]}}
    found, said = followed(text_recipe(held, "words2", [file_of(held / "more.jsonl")], model=model), held / "held")
    assert found.model.add_tokens is not None
    assert found.model.add_tokens.tokens == (" wombat",)
    assert "1 of `model.add_tokens` are in the earlier run's vocabulary already" in said


def test_another_tokenizer_is_refused_by_name(held: Path) -> None:
    model = {"base": str(held / "base"), "tokenizer": "builtin:tiny"}
    path = text_recipe(held, "other", [file_of(held / "more.jsonl")], model=model)
    with pytest.raises(RequestError) as refused:
        followed(path, held / "held")
    assert [problem.where for problem in refused.value.problems] == ["model.tokenizer"]


def test_a_name_that_other_rows_had_in_the_earlier_run_is_made_another(life: Path) -> None:
    one = {"source": {"kind": "builtin", "name": "clinic", "split": "test"}, "format": {"kind": "text"}, "name": "orders", "limit": 4}
    path = text_recipe(life, "named", [file_of(life / "words.jsonl")], data={"evaluation": [one]})
    found, said = followed(path, life / "first")
    assert [(source.name, source.role) for source in found.data.evaluation] == [("orders of named", "target"), ("orders", "retained")]
    assert "is called `orders of named`" in said


def test_rows_that_the_objective_cannot_learn_from_are_not_replayed(held: Path) -> None:
    labels = {"source": {"kind": "builtin", "name": "reviews"}, "format": {"kind": "label", "text": "prompt", "label": "completion"}}
    path = text_recipe(held, "labels", [{**labels, "limit": 12}], objective={"kind": "classification"})
    found, said = followed(path, held / "held")
    assert len(found.data.train) == 1
    assert "`words of held` is not replayed: objective `classification` cannot learn from it" in said


def test_a_run_of_a_life_that_is_not_where_it_was_is_told_by_whoever_came_after_it(life: Path, tmp_path: Path) -> None:
    shutil.copytree(life / "third", tmp_path / "third")
    said = manifest(tmp_path / "third")
    (tmp_path / "third" / "manifest.json").write_text(json.dumps({**said, "after": str(tmp_path / "moved")}))
    with pytest.raises(UsageError) as refused:
        followed(write_recipe(life, "lost", LORA, "orders", "chat"), tmp_path / "third", 0)
    assert f"`{tmp_path / 'moved'}`, which `{tmp_path / 'third'}` came after, is no run folder" in str(refused.value)


def test_data_that_has_changed_since_is_refused(held: Path) -> None:
    shutil.copytree(held / "held", held / "changed")
    said = manifest(held / "changed")
    said["hashes"]["data/words"] = "another"
    (held / "changed" / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(RequestError, match="the data of `held` has changed"):
        followed(text_recipe(held, "changed2", [file_of(held / "more.jsonl")]), held / "changed", 9)


def test_positions_that_are_scaled_anew_leave_nothing_to_compare() -> None:
    def proofs(*models: Model) -> list[bool | None]:
        found: dict[str, Any] = {"proofs": [{"passed": False, "detail": "began elsewhere"} for _ in models[1:]]}
        _excuse_rescaled(found, models)
        return [proof["passed"] for proof in found["proofs"]]

    plain, scaled = Model(base="x"), Model.model_validate({"base": "x", "rope": {"kind": "linear", "factor": 2.0}})
    assert proofs(plain, scaled, scaled, plain) == [None, False, False]
