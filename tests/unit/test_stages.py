"""What several runs measure: the same rows in one column, other rows in another, and rows held out once are measured ever after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.unit.test_chain import LORA, TINY, write_chain

from ftcli.cli.main import run
from ftcli.data.prepare import prepare
from ftcli.data.settings import Data
from ftcli.errors import RecipeError, UsageError
from ftcli.models.tokenizer import load_tokenizer
from ftcli.recipe.chain import load_chain
from ftcli.reporting.found_run import find_run
from ftcli.training.stages import beginning_proofs, last_run, over_stages, read_chain, report_lines, require_proven

FULL = {"kind": "full"}
WORDS = {"A": ["the", "cat", "sat", "on", "a", "mat"], "B": ["dyspnoea", "therapy", "dosage", "patient", "infarction"]}


def write_rows(folder: Path, name: str, count: int = 40) -> dict[str, Any]:
    """`folder`/A/train.jsonl, say, with texts of A's words, as an entry of a recipe."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    words = WORDS[path.parent.name]
    rows = [" ".join(words[(number * step) % len(words)] for step in range(1, 9)) + f" {path.stem} {number}" for number in range(count)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return {"source": {"kind": "file", "path": str(path)}, "format": {"kind": "text"}}


def a_stage(folder: Path, name: str, letter: str, *evaluation: dict[str, Any], **parts: Any) -> dict[str, Any]:
    data = {"train": [write_rows(folder, f"{letter}/train.jsonl")], "evaluation": list(evaluation), "max_length": 64}
    return {"name": name, "method": FULL, "data": data, **parts}


def measured(path: Path) -> list[list[tuple[str | None, str]]]:
    """Name and role of what each stage of the chain measures."""
    stages = load_chain(path).stages
    return [[(source.name, source.role) for source in stage.loaded.recipe.data.evaluation] for stage in stages]


def test_sources_that_are_called_alike_have_names_of_their_own_in_all_stages(tmp_path: Path) -> None:
    tests = {letter: write_rows(tmp_path, f"{letter}/test.jsonl") for letter in "AB"}
    stages = [a_stage(tmp_path, f"s{index}", letter, tests[letter]) for index, letter in enumerate("ABA")]
    assert measured(write_chain(tmp_path, stages)) == [
        [("test", "target")],
        [("test-2", "target"), ("test", "retained")],
        [("test", "target"), ("test-2", "retained")],
    ]


def test_a_name_that_only_one_stage_gives_is_the_name_in_all(tmp_path: Path) -> None:
    test = write_rows(tmp_path, "A/test.jsonl")
    stages = [a_stage(tmp_path, "one", "A", test), a_stage(tmp_path, "two", "B", {**test, "name": "mine", "role": "retained"})]
    assert measured(write_chain(tmp_path, stages)) == [[("mine", "target")], [("mine", "retained")]]


@pytest.mark.parametrize(
    ("names", "letters", "message"),
    [
        (("held", "held"), "AB", "stages.1.data.evaluation.0.name: `held` of stage `two` is the name of other rows in stage `one`"),
        (("a", "b"), "AA", "stages.1.data.evaluation.0.name: `b` is called `a` in stage `one`: the same rows under two names"),
    ],
)
def test_names_that_contradict_are_told_by_entry_and_stage(tmp_path: Path, names: tuple[str, str], letters: str, message: str) -> None:
    listed = [{**write_rows(tmp_path, f"{letter}/test.jsonl"), "name": name} for name, letter in zip(names, letters, strict=True)]
    stages = [a_stage(tmp_path, name, "A", source) for name, source in zip(("one", "two"), listed, strict=True)]
    with pytest.raises(RecipeError) as caught:
        load_chain(write_chain(tmp_path, stages))
    assert message in str(caught.value)


def test_rows_that_a_stage_lists_twice_are_told(tmp_path: Path) -> None:
    test = write_rows(tmp_path, "A/test.jsonl")
    with pytest.raises(RecipeError) as caught:
        load_chain(write_chain(tmp_path, [a_stage(tmp_path, "one", "A", test, {**test, "role": "retained"})]))
    assert "stages.0.data.evaluation.1: stage `one` lists these rows twice" in str(caught.value)


def test_a_stage_measures_of_earlier_ones_what_its_objective_can_read(tmp_path: Path) -> None:
    reviews = {"source": {"kind": "builtin", "name": "reviews"}, "format": {"kind": "label", "text": "prompt", "label": "completion"}}
    labels = {"name": "labels", "method": FULL, "objective": {"kind": "classification"}, "data": {"train": [reviews]}}
    common = {key: value for key, value in write_rows(tmp_path, "B/test.jsonl").items() if key != "format"}
    stages = [a_stage(tmp_path, "text", "A"), labels]
    assert measured(write_chain(tmp_path, stages, evaluation=[common])) == [[("test", "retained")], []]
    found = measured(write_chain(tmp_path, [a_stage(tmp_path, "text", "A"), labels]))
    assert found == [[("train-holdout", "target")], [("reviews-holdout", "target")]]


def summary(name: str, rows: str, before: float, after: float, targets: int = 9, **more: Any) -> dict[str, Any]:
    def one(value: float) -> dict[str, Any]:
        return {name: {"loss": value, "bits_per_byte": value, "targets": targets, "role": "target"}}

    return {"before": one(before), "after": one(after), "rows": {name: rows}, **more}


def test_the_matrix_tells_sources_apart_by_their_rows_and_not_by_their_names() -> None:
    runs = [summary("test", "rows of a", 3.3, 3.2), summary("test", "rows of b", 5.7, 5.2), summary("other", "rows of a", 4.0, 3.9)]
    matrix = over_stages(["one", "two", "three"], runs)["matrix"]
    assert (matrix["sources"], matrix["learnt_at"]) == (["test", "test-2"], [3, 2])
    assert matrix["bits_per_byte"] == [[3.3, None], [3.2, None], [None, 5.2], [3.9, None]]


def a_run(**sources: tuple[str, float, float]) -> dict[str, Any]:
    """A summary of role, bits per byte before and after of each source."""

    def at(moment: int) -> dict[str, Any]:
        return {
            name: {"loss": one[moment], "bits_per_byte": one[moment], "targets": 9, "role": one[0]}  # type: ignore[misc]
            for name, one in sources.items()
        }

    return {"before": at(1), "after": at(2), "rows": {name: name for name in sources}}


def test_what_is_learnt_last_does_not_hide_what_was_lost() -> None:
    """`new` is watched by the first stage and learnt by the second, which loses half of what the first has learnt."""
    runs = [
        a_run(old=("target", 4.0, 2.0), new=("retained", 5.0, 4.8)),
        a_run(new=("target", 4.8, 1.0), old=("retained", 2.0, 3.0)),
    ]
    found = over_stages(["one", "two"], runs)
    assert found["matrix"]["learnt_at"] == [1, 2]
    assert (found["retention"]["backward_transfer"], found["retention"]["forgetting"]) == (-1.0, 1.0)
    assert found["retention"]["forward_transfer"] == pytest.approx(0.2)
    assert "forgetting (bits per byte lost of it since its best): +1.0000" in report_lines(found)


def test_what_no_stage_learnt_is_told_by_source_and_is_no_transfer() -> None:
    """Both are watched only, as what a chain measures in all stages: each is told of alone."""
    runs = [a_run(b=("retained", 4.0, 2.0), a=("retained", 5.0, 4.8)), a_run(b=("retained", 2.0, 3.0), a=("retained", 4.8, 1.0))]
    found = over_stages(["one", "two"], runs)
    assert (found["retention"]["backward_transfer"], found["retention"]["forgetting"]) == (None, None)
    assert [one["backward_transfer"] for one in found["retention"]["by_source"]] == [None, None]
    assert [one["forgetting"] for one in found["retention"]["by_source"]] == pytest.approx([1.0, -3.8])
    assert "| lost since the best | +1.0000 | -3.8000 |" in report_lines(found)
    assert "| learnt in | (only watched) | (only watched) |" in report_lines(found)


def test_what_a_later_stage_learns_again_is_no_transfer() -> None:
    runs = [
        a_run(a=("target", 4.0, 2.0)),
        a_run(b=("target", 4.0, 2.0), a=("retained", 2.0, 3.0)),
        a_run(a=("target", 3.0, 1.0), b=("retained", 2.0, 2.5)),
    ]
    found = over_stages(["one", "two", "three"], runs)
    assert found["matrix"]["learnt_at"] == [3, 2]
    assert found["retention"]["backward_transfer"] == -0.5
    assert found["retention"]["forgetting"] == 0.5


def test_figures_of_a_text_that_was_cut_otherwise_are_not_set_side_by_side() -> None:
    runs = [a_run(a=("target", 4.0, 2.0)), a_run(a=("retained", 2.2, 2.4), b=("target", 4.0, 3.0))]
    runs[1]["cut"] = {"a": "`max_length: 32`, `split`"}
    found = over_stages(["one", "two"], runs)
    assert found["matrix"]["bits_per_byte"] == [[4.0, None], [2.0, None], [None, 3.0]]
    assert [proof["passed"] for proof in found["proofs"]] == [None]
    lines = "\n".join(report_lines(found))
    assert "`a` after `two` is left empty: its text was cut otherwise (`max_length: 32`, `split`)" in lines
    assert "not verified: two" in lines
    same = over_stages(["one", "two"], [{**run, "cut": runs[1]["cut"]} for run in runs])
    assert same["matrix"]["not_compared"] == []
    assert [proof["passed"] for proof in same["proofs"]] == [False]


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of other lengths than each other; all texts are longer than the second's."""
    folder = tmp_path_factory.mktemp("lengths")
    stages = [a_stage(folder, name, name, write_rows(folder, f"{name}/test.jsonl", 8)) for name in "AB"]
    stages[1]["data"].update(max_length=8, on_overflow="drop")
    stages[1]["data"]["train"] = [{**write_rows(folder, "B/few.jsonl"), "limit": 20}]
    (folder / "B" / "few.jsonl").write_text("".join(json.dumps({"text": "a cat"}) + "\n" for _ in range(40)))
    stages[1]["data"]["evaluation"] = [{**stages[1]["data"]["train"][0], "limit": 4}]
    assert run(["train", str(write_chain(folder, stages, every={"log": 4}))]) == 0
    return folder


def test_a_stage_measures_what_an_earlier_one_did_on_the_same_text(lengths: Path) -> None:
    found = read_chain(lengths / "out")
    assert [proof["passed"] for proof in found["proofs"]] == [True]
    assert all(row[0] is not None for row in found["matrix"]["bits_per_byte"])
    second = load_chain(lengths / "chain.yaml").stages[1].loaded.recipe.data.evaluation
    assert [(source.max_length, source.on_overflow) for source in second] == [(None, None), (64, "auto")]


def test_a_run_after_another_measures_what_that_one_did_on_the_same_text(lengths: Path) -> None:
    from ftcli.recipe.load import load_recipe
    from ftcli.reporting.live import Reporter
    from ftcli.training.after import follow

    document = {
        "version": 1,
        "name": "next",
        "model": json.loads((lengths / "chain.yaml").read_text())["model"],
        "data": a_stage(lengths, "x", "A")["data"] | {"max_length": 16, "evaluation": [write_rows(lengths, "B/few.jsonl") | {"limit": 4}]},
    }
    (lengths / "next.yaml").write_text(json.dumps(document))
    found = follow(load_recipe(lengths / "next.yaml", follows=True), lengths / "out", 0, Reporter(silent=True)).recipe
    assert [(source.name, source.max_length, source.on_overflow) for source in found.data.evaluation] == [
        ("few", 8, "drop"),
        ("test", 64, None),
    ]


def test_a_method_with_a_prompt_before_it_measures_with_its_own_lengths(tmp_path: Path) -> None:
    """The longer examples of another stage and the prompt may be more than the model can see."""
    stages = [a_stage(tmp_path, "one", "A"), a_stage(tmp_path, "two", "B", method={"kind": "prompt", "prompt_length": 4})]
    stages[1]["data"]["max_length"] = 32
    second = load_chain(write_chain(tmp_path, stages)).stages[1].loaded.recipe.data.evaluation
    assert [source.max_length for source in second] == [None, None]
    stages[1]["method"] = FULL
    second = load_chain(write_chain(tmp_path, stages)).stages[1].loaded.recipe.data.evaluation
    assert [source.max_length for source in second] == [None, 64]


@pytest.mark.parametrize(
    ("second", "passed", "word"),
    [
        (summary("test", "rows of a", 3.2, 3.0), True, "passed: two began where `one` ended: the loss of 1 source differs by 0.0e+00"),
        (summary("test", "rows of a", 3.3, 3.0), False, "FAILED: two"),
        (summary("test", "rows of b", 3.2, 3.0), None, "not verified: two began where `one` ended: nothing to compare, no source"),
        (summary("test", "rows of a", 3.2, 3.0, targets=8), None, "nothing to compare, what both measure is cut otherwise or has"),
    ],
)
def test_a_proof_over_nothing_is_no_proof(second: dict[str, Any], passed: bool | None, word: str) -> None:
    proofs = beginning_proofs(["one", "two"], [summary("test", "rows of a", 3.3, 3.2), second])
    assert [proof["passed"] for proof in proofs] == [passed]
    nothing = {"sources": [], "stages": [], "bits_per_byte": [], "not_compared": []}
    kept = dict.fromkeys(("backward_transfer", "forgetting"))
    assert word in "\n".join(report_lines({"matrix": nothing, "retention": kept, "proofs": proofs}))
    if passed is None:
        require_proven({"proofs": proofs})


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain without any evaluation: A, B, and A again."""
    folder = tmp_path_factory.mktemp("held")
    stages = [a_stage(folder, f"s{index}", letter) for index, letter in enumerate("ABA")]
    assert run(["train", str(write_chain(folder, stages, every={"log": 4}))]) == 0
    return folder / "out"


def data_of(chain: Path, index: int) -> list[tuple[str, str, int]]:
    path = sorted((chain / "stages").glob("*/manifest.json"))[index]
    return [(report["name"], report["role"], report["num_examples"]) for report in json.loads(path.read_text())["data"]]


def test_rows_that_a_stage_holds_out_are_measured_in_all_later_stages(held: Path) -> None:
    found = read_chain(held)
    assert found["matrix"]["sources"] == ["train-holdout", "train-holdout-2"]
    known = [[value is not None for value in row] for row in found["matrix"]["bits_per_byte"]]
    assert known == [[True, False], [True, False], [True, True], [True, True]]
    assert [proof["passed"] for proof in found["proofs"]] == [True, True]


def test_rows_that_a_stage_holds_out_are_trained_on_in_no_later_stage(held: Path) -> None:
    assert data_of(held, 0) == [("train", "new", 38), ("train-holdout", "target", 2)]
    assert data_of(held, 1) == [("train", "new", 38), ("train-holdout-2", "target", 2), ("train-holdout", "retained", 2)]
    assert data_of(held, 2) == [("train", "new", 38), ("train-holdout", "target", 2), ("train-holdout-2", "retained", 2)]


def test_held_out_rows_are_left_out_of_a_longer_part_of_their_source(tmp_path: Path) -> None:
    source = write_rows(tmp_path, "A/train.jsonl", count=200)
    kept = {**source, "limit": 100, "holdout": 0.1, "name": "held"}
    data = Data.model_validate_json(json.dumps({"train": [{**source, "name": "all"}, {**source, "limit": 50}], "evaluation": [kept]}))
    found = prepare(data, load_tokenizer("builtin:tiny"), cache_folder=tmp_path / "cache")
    whole, beginning, held_out = (set(store.rows.tolist()) for store in (*found.train, *found.evaluation))
    assert (len(held_out), max(held_out) < 100) == (10, True)
    assert whole == set(range(200)) - held_out
    assert beginning == set(range(50)) - held_out


def test_a_chain_says_which_of_its_runs_to_name(held: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find_run(str(held), held.parent)
    assert f"`{held}` is a chain of 3 runs" in str(caught.value)
    assert f"`{held / 'stages' / '02-s1'}`" in str(caught.value)


def test_a_run_after_a_chain_is_after_its_last_stage(held: Path, tmp_path: Path) -> None:
    assert last_run(held) == held / "stages" / "03-s2"
    assert last_run(held / "stages" / "01-s0") == held / "stages" / "01-s0"
    manifests = [json.loads(path.read_text()) for path in sorted((held / "stages").glob("*/manifest.json"))]
    assert [manifest.get("after") for manifest in manifests] == [None, str(held / "stages" / "01-s0"), str(held / "stages" / "02-s1")]
    (tmp_path / "chain.json").write_text(json.dumps({"status": "running", "stages": []}))
    with pytest.raises(UsageError, match="is not finished"):
        last_run(tmp_path)


def test_a_chain_is_verified_stage_by_stage(held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(held), "--json"]) == 0
    proofs = json.loads(capsys.readouterr().out)["proofs"]
    assert {proof["name"].partition("/")[0] for proof in proofs} == {"01-s0", "02-s1", "03-s2"}


def test_what_one_stage_has_grown_is_what_later_ones_train(tmp_path: Path) -> None:
    grown = {"kind": "freeze", "grown": True}
    stages = [a_stage(tmp_path, "one", "A", method=grown), a_stage(tmp_path, "two", "B", method=LORA), a_stage(tmp_path, "three", "A")]
    stages[2]["method"] = grown
    model = {
        "init": {"architecture": "llama", "config": TINY},
        "tokenizer": "builtin:tiny",
        "grow": {"kind": "blocks", "num_blocks": 1},
    }
    path = write_chain(tmp_path, stages, model=model, every={"log": 4})
    assert run(["check", "--fast", str(path)]) == 0
    assert run(["train", str(path)]) == 0
    folders = [tmp_path / "out" / "stages" / name for name in ("01-one/model", "02-two/merged", "03-three/model")]
    names = json.loads((folders[0] / "grown.json").read_text())["parameters"]
    assert names
    assert all(name.startswith("model.layers.2.") for name in names)
    before, after = (load_file(folder / "model.safetensors") for folder in folders[1:])
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert changed <= set(names)


def test_a_stage_cannot_train_what_no_stage_has_grown(tmp_path: Path) -> None:
    stages = [a_stage(tmp_path, "one", "A"), a_stage(tmp_path, "two", "B", method={"kind": "freeze", "grown": True})]
    with pytest.raises(RecipeError) as caught:
        load_chain(write_chain(tmp_path, stages))
    assert "stages.1.method.grown (line 1" in str(caught.value)
    assert "the base is not grown" in str(caught.value)
