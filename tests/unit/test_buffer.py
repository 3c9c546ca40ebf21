"""The replay buffer: a fair sample of all different rows that were ever seen, of bounded size, carried from run to run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.test_after import file_of, followed, rows_file, sampled, text_recipe, write_base

from ftcli.cli.main import run
from ftcli.data.buffer import Buffer, Seen, fill_buffer, read_buffer
from ftcli.data.names import rows_of
from ftcli.data.settings import TrainSource
from ftcli.errors import DataError
from ftcli.reporting.live import Reporter
from ftcli.training.earlier import Earlier
from ftcli.training.folder import RunFolder


def seen(source: TrainSource, first: int = 0, end: int | None = None) -> Seen:
    return Seen(source, [row for _, row in source.source.rows()][first:end])


def fill(folder: Path, sources: list[Seen], earlier: Buffer | None = None, *, size: int = 10, seed: int = 1) -> Buffer:
    return fill_buffer(sources, earlier, folder, size, seed, "")


def texts(buffer: Buffer) -> list[str]:
    return sampled(buffer.sources)


def test_every_row_ever_seen_has_the_same_chance_to_be_kept(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    first, second, third = (rows_file(tmp_path / f"{name}.jsonl", size, name) for name, size in (("a", 30), ("b", 2), ("c", 8)))
    for seed in range(150):
        one = fill(tmp_path / f"one-{seed}", [seen(first), seen(second)], seed=seed)
        counts.update(texts(fill(tmp_path / f"both-{seed}", [seen(third)], one, seed=seed + 1000)))
    assert sum(counts.values()) == 150 * 10
    chances = {name: [counts[f"{name} {index}"] / 150 for index in range(size)] for name, size in (("a", 30), ("b", 2), ("c", 8))}
    # 0.25 each, of the source with two rows, too; the standard deviation of one of 150 draws is 0.035
    assert max(abs(chance - 0.25) for some in chances.values() for chance in some) < 0.14


def test_a_row_that_several_runs_have_seen_counts_once(tmp_path: Path) -> None:
    """A file that every run replays, as one has it, and two files with the same row."""
    old, other = rows_file(tmp_path / "old.jsonl", 40, "old"), rows_file(tmp_path / "new.jsonl", 40, "new")
    (tmp_path / "copy.jsonl").write_text((tmp_path / "old.jsonl").read_text())
    copy = old.model_copy(update={"source": old.source.model_copy(update={"path": str(tmp_path / "copy.jsonl")})})
    counts: Counter[str] = Counter()
    for seed in range(40):
        found: Buffer | None = None
        for number in range(4):
            found = fill(tmp_path / f"{seed}-{number}", [seen(old), seen(copy), *([seen(other)] if number == 3 else [])], found, seed=seed)
        assert found is not None
        assert len(set(texts(found))) == len(texts(found)) == 10
        counts.update(text.partition(" ")[0] for text in texts(found))
    # Half and half; the standard deviation of the share is 0.023 at most.
    assert counts["old"] / 400 == pytest.approx(0.5, abs=0.1)
    assert fill(tmp_path / "all", [seen(old), seen(copy)], size=100).num_rows == 40


def test_a_buffer_is_the_same_for_the_same_seed_and_another_for_another(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "a.jsonl", 50, "a")
    one, same, another = (fill(tmp_path / name, [seen(source)], size=5, seed=seed) for name, seed in (("x", 1), ("y", 1), ("z", 2)))
    assert texts(one) == texts(same) != texts(another)
    assert read_buffer(tmp_path / "x") == one
    # The seed of a life is that of its first run.
    assert fill(tmp_path / "next", [], one, size=5, seed=2).seed == 1


def test_a_sample_is_not_drawn_on_for_more_than_it_has(tmp_path: Path) -> None:
    """Of 50 rows 5 were kept: of 50 more about as many stand beside them, whatever the size."""
    old, new = rows_file(tmp_path / "a.jsonl", 50, "a"), rows_file(tmp_path / "b.jsonl", 50, "b")
    before = fill(tmp_path / "x", [seen(old)], size=5)
    after = fill(tmp_path / "y", [seen(new)], before, size=40)
    assert after.complete_below == before.complete_below
    assert set(texts(before)) < set(texts(after))
    assert 5 < after.num_rows < 16
    whole = fill(tmp_path / "v", [seen(old)], size=90)
    assert whole.complete_below is None
    assert fill(tmp_path / "w", [seen(new)], whole, size=90).num_rows == 90


def test_rows_stand_in_the_order_of_their_source(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "a.jsonl", 20, "a")
    assert texts(fill(tmp_path / "x", [seen(source, 3, 6)])) == ["a 3", "a 4", "a 5"]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps on a, and others that go on from it: a branch off its eighth step on b, and one from its result on b."""
    folder = tmp_path_factory.mktemp("trunk")
    write_base(folder)
    for name in "abc":
        rows_file(folder / f"{name}.jsonl", 60, name)
    base: dict[str, Any] = {"every": {"log": 4, "save": 4}}

    def recipe(name: str, source: str, steps: int, **parts: Any) -> Path:
        held = [file_of(folder / f"{source}.jsonl", limit=3, name=f"{source} held")]
        train = {"steps": steps, "global_batch_size": 2, "lr": 1e-3}
        return text_recipe(
            folder, name, [file_of(folder / f"{source}.jsonl")], data={"evaluation": held, "holdout": 0.0}, train=train, **base, **parts
        )

    assert run(["train", str(recipe("trunk", "a", 12))]) == 0
    branch = {"path": str(folder / "trunk" / "checkpoints" / "step-000008"), "continues": True}
    assert run(["train", str(recipe("branch", "b", 12, init_from=branch))]) == 0
    assert run(["train", str(recipe("from", "b", 4, init_from={"path": str(folder / "trunk")}))]) == 0
    recipe("next", "c", 4)
    return folder


def kept_of(folder: Path, after: str) -> Counter[str]:
    followed(folder / "next.yaml", folder / after, 100)
    return Counter(text.partition(" ")[0] for text in texts(read_buffer(folder / after / "replay-100")))


def test_a_branch_has_seen_what_its_trunk_had_and_what_came_after(trunk: Path) -> None:
    assert kept_of(trunk, "branch") == {"a": 16, "b": 8}
    assert kept_of(trunk, "trunk") == {"a": 24}


def test_a_run_that_was_begun_from_another_has_seen_what_that_one_had(trunk: Path) -> None:
    assert kept_of(trunk, "from") == {"a": 24, "b": 8}


def test_a_run_after_one_that_was_begun_from_another_measures_what_both_did(trunk: Path) -> None:
    found, _ = followed(trunk / "next.yaml", trunk / "from", 0)
    assert [source.name for source in found.data.evaluation] == ["c held", "b held", "a held"]
    assert run(["train", str(trunk / "next.yaml"), "--after", str(trunk / "from"), "--replay-rows", "0"]) == 0
    stages = json.loads((trunk / "next" / "stages.json").read_text())
    assert [Path(path).name for path in stages["runs"]] == ["trunk", "from", "next"]
    assert stages["matrix"]["sources"] == ["a held", "b held", "c held"]
    assert [proof["passed"] for proof in stages["proofs"]] == [None, True]


def test_a_life_is_found_where_a_run_was_killed_before_it_could_name_the_one_before(trunk: Path) -> None:
    path = trunk / "next" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("after") == str(trunk / "from")
    path.write_text(json.dumps(manifest))
    from ftcli.training.after import history

    assert [one.folder.path.name for one in history(trunk / "next", Reporter(silent=True))] == ["trunk", "from", "next"]


@pytest.mark.parametrize("content", ["{", "[]", '{"sources": [], "seed": 0}', '{"sources": [3], "seed": 0, "complete_below": null}'])
def test_a_buffer_that_cannot_be_read_is_said_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "buffer.json").write_text(content)
    with pytest.raises(DataError, match="a replay buffer cannot be read") as caught:
        read_buffer(tmp_path)
    assert "buffer.json" in caught.value.problems[0].what


def test_a_run_without_early_stopping_has_seen_what_came_after_its_best_step(trunk: Path) -> None:
    manifest = json.loads((trunk / "trunk" / "manifest.json").read_text())
    manifest["summary"]["best_step"] = 4
    folder = trunk / "judged"
    shutil.copytree(trunk / "trunk", folder, ignore=shutil.ignore_patterns("replay-*"))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert kept_of(trunk, "judged") == {"a": 24}
    assert not Earlier(RunFolder(folder), Reporter(silent=True), 4).is_whole
    resolved = folder / "recipe.resolved.yaml"
    recipe = yaml.safe_load(resolved.read_text())
    recipe["train"]["early_stopping"], recipe["every"]["evaluate"] = {"patience": 1}, 4
    resolved.write_text(yaml.safe_dump(recipe))
    assert Earlier(RunFolder(folder), Reporter(silent=True), 4).is_whole
    assert Earlier(RunFolder(folder), Reporter(silent=True)).last_step == 4


def test_the_data_of_a_base_that_another_run_made_need_not_be_there(trunk: Path) -> None:
    (trunk / "gone.jsonl").write_text((trunk / "a.jsonl").read_text())
    train = {"steps": 4, "global_batch_size": 2, "lr": 1e-3}
    held = [file_of(trunk / "b.jsonl", limit=3, name="b held")]
    parts = {"data": {"evaluation": held, "holdout": 0.0}, "train": train}
    assert run(["train", str(text_recipe(trunk, "maker", [file_of(trunk / "gone.jsonl")], train=train))]) == 0
    on_it = text_recipe(trunk, "on-it", [file_of(trunk / "b.jsonl")], model={"base": str(trunk / "maker" / "model")}, **parts)
    assert run(["train", str(on_it)]) == 0
    assert kept_of(trunk, "on-it") == {"a": 8, "b": 8}
    shutil.rmtree(trunk / "on-it" / "replay-100")
    shutil.rmtree(trunk / "maker" / "replay-100")
    (trunk / "gone.jsonl").unlink()
    found, said = followed(trunk / "next.yaml", trunk / "on-it", 100)
    assert [source.name for source in found.data.evaluation] == ["c held", "b held"]
    assert "`on-it` began from" in said
    assert "neither replayed nor measured" in said
    assert kept_of(trunk, "on-it") == {"b": 8}


def test_each_source_is_read_as_the_run_that_measured_it_read_it(trunk: Path) -> None:
    folder = trunk / "otherwise"
    shutil.copytree(trunk / "from", folder)
    resolved = folder / "recipe.resolved.yaml"
    recipe = yaml.safe_load(resolved.read_text())
    recipe["objective"] = {"kind": "classification", "readout": "label-words"}
    resolved.write_text(yaml.safe_dump(recipe))
    one = Earlier(RunFolder(folder), Reporter(silent=True))
    assert one.before is not None
    found = {source.name: one.formats()[rows_of(source)] for source in one.evaluation()}
    assert found == {"b held": one.recipe.objective.formats, "a held": one.before.recipe.objective.formats}
    assert found["b held"] != found["a held"]
