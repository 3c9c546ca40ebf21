"""ColD fusion: rounds in a shared folder, what is read of them, and what is not."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_chat_model import write_tiny_chat_model

from ftcli.cli.main import run
from ftcli.errors import GateError, RequestError, RunError, UsageError
from ftcli.merging.cold import begin, fuse, put, status
from ftcli.merging.meeting import Meeting


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a recipe that trains it for two steps, and a working folder."""
    monkeypatch.chdir(tmp_path)
    write_tiny_chat_model(tmp_path / "base")
    rows = [{"text": f"{letter} {letter * 5}"} for letter in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_recipe(tmp_path / "recipe.yaml", "base")
    return tmp_path


def write_recipe(path: Path, base: str, **changes: Any) -> None:
    document = {
        "version": 1,
        "name": "one",
        "model": {"base": base},
        "data": {"train": [{"source": {"kind": "file", "path": "rows.jsonl"}}], "max_length": 32, "holdout": 0.0},
        "method": {"kind": "full"},
        "train": {"steps": 2, "global_batch_size": 4, "lr": 1e-3},
        **changes,
    }
    path.write_text(json.dumps(document))


def changed_copy(model: Path, target: Path, seed: int) -> Path:
    """The model with other weights."""
    shutil.copytree(model, target)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in load_file(target / "model.safetensors").items()
    }
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def assert_equal(found: Path, expected: dict[str, torch.Tensor]) -> None:
    actual = weights_of(found)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("count", [1, 2])
def test_a_model_of_two_dtypes_keeps_them(count: int, place: Path) -> None:
    """Norms in float32 and the rest in bfloat16; one contribution is the next round bit for bit, and what nobody changes is, too."""
    weights = {
        name: tensor * 1.001 if "norm" in name else tensor.bfloat16()
        for name, tensor in load_file(place / "base" / "model.safetensors").items()
    }
    save_file(weights, place / "base" / "model.safetensors", {"format": "pt"})
    meeting = begin(place / "meet", str(place / "base"))
    expected = {name: tensor + 0.01 if "layers.0" in name else tensor for name, tensor in weights.items()}
    for index in range(count):
        shutil.copytree(place / "base", place / f"m{index}")
        save_file(expected, place / f"m{index}" / "model.safetensors", {"format": "pt"})
        put(meeting, meeting.current, f"m{index}", place / f"m{index}", {})
    fuse(meeting, threads=1, verify=False)
    found = weights_of(meeting.current.model)
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in weights.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected if count == 1 or "layers.0" not in name)


def test_the_only_contribution_is_the_next_round_whatever_its_dtypes(place: Path) -> None:
    """A round in float32, and what somebody stored in bfloat16 but for the norms."""
    meeting = begin(place / "meet", str(place / "base"))
    weights = {
        name: tensor * 1.001 if "norm" in name else tensor.bfloat16()
        for name, tensor in load_file(place / "base" / "model.safetensors").items()
    }
    shutil.copytree(place / "base", place / "m0")
    save_file(weights, place / "m0" / "model.safetensors", {"format": "pt"})
    put(meeting, meeting.current, "m0", place / "m0", {})
    fuse(meeting, threads=1, verify=False)
    found = weights_of(meeting.current.model)
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_contributions_of_another_dtype_than_the_rounds_decide_it(place: Path) -> None:
    """As whole models made of adapters are float32, whatever the round's is."""
    weights = load_file(place / "base" / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, place / "base" / "model.safetensors", {"format": "pt"})
    meeting = begin(place / "meet", str(place / "base"))
    for index in range(2):
        shutil.copytree(place / "base", place / f"m{index}")
        save_file({name: tensor + index for name, tensor in weights.items()}, place / f"m{index}" / "model.safetensors", {"format": "pt"})
        put(meeting, meeting.current, f"m{index}", place / f"m{index}", {})
    fuse(meeting, threads=1, verify=False)
    for name, tensor in weights_of(meeting.current.model).items():
        torch.testing.assert_close(tensor, weights[name] + 0.5, rtol=1e-6, atol=1e-6)


def test_a_round_is_the_mean_of_its_contributions(place: Path) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    models = [changed_copy(place / "base", place / f"m{index}", index) for index in range(3)]
    for model in models:
        put(meeting, meeting.current, model.name, model, {})
    with pytest.raises(GateError, match="3 of 4"):
        fuse(meeting, expect=4)
    report = fuse(meeting, expect=3, threads=1, verify=False)
    assert report["contributions"] == ["m0", "m1", "m2"]
    parts = [weights_of(model) for model in models]
    found = weights_of(meeting.current.model)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name] + parts[2][name]) / 3)
    assert meeting.current.number == 1
    assert [note["name"] for note in meeting.info()["rounds"][0]["contributions"]] == ["m0", "m1", "m2"]


def test_models_that_were_not_trained_give_the_same_model(place: Path) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    for name in ("a", "b", "c"):
        put(meeting, meeting.current, name, meeting.current.model, {})
    fuse(meeting, threads=1, verify=False)
    assert_equal(meeting.current.model, weights_of(place / "base"))


def test_one_contributor_is_sequential_fine_tuning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cold", "init", "meet", "--base", str(place / "base")]) == 0
    for _ in range(2):
        assert run(["cold", "contribute", "meet", "--recipe", "recipe.yaml"]) == 0
        assert run(["cold", "fuse", "meet", "--expect", "1", "--no-verify"]) == 0
    base = "base"
    for step in range(2):
        write_recipe(place / "plain.yaml", base, name=f"plain-{step}")
        assert run(["train", "plain.yaml"]) == 0
        base = f"runs/plain-{step}/model"
    assert_equal(place / "meet" / "rounds" / "002" / "model", weights_of(place / base))
    assert not torch.equal(weights_of(place / base)["model.norm.weight"], weights_of(place / "base")["model.norm.weight"])
    capsys.readouterr()
    assert run(["cold", "status", "meet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["current"], [len(each["contributions"]) for each in report["rounds"]]) == (2, [1, 1, 0])


def test_an_adapter_is_contributed_as_the_whole_model_it_makes(place: Path) -> None:
    write_recipe(place / "recipe.yaml", "base", method={"kind": "lora", "rank": 2})
    assert run(["cold", "init", "meet", "--base", str(place / "base")]) == 0
    assert run(["cold", "contribute", "meet", "--recipe", "recipe.yaml", "--name", "lora", "--set", "train.lr=1e-2"]) == 0
    assert run(["cold", "fuse", "meet"]) == 0
    before, after = weights_of(place / "base"), weights_of(place / "meet" / "rounds" / "001" / "model")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_what_is_half_written_is_ignored_and_tidied(place: Path) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    model = changed_copy(place / "base", place / "m", 1)
    half = meeting.current.folder / "contributions" / ".partial-x-123"
    (half / "model").mkdir(parents=True)
    (half / "contribution.json").write_text("{}")
    (meeting.current.folder / "contributions" / "no-note").mkdir()
    with pytest.raises(GateError, match="0 of 1"):
        fuse(meeting)
    put(meeting, meeting.current, "m", model, {})
    fuse(meeting, threads=1, verify=False)
    assert not half.exists()
    assert_equal(meeting.current.model, weights_of(model))


def test_concurrent_contributors_do_not_clash(place: Path) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    now = meeting.current

    def attempt(name: str) -> str:
        try:
            put(meeting, now, name, place / "base", {})
        except UsageError:
            return "refused"
        return "put"

    names = ["a", "b", "same", "same", "same", "c"]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(attempt, names))
    assert [results[names.index(name)] for name in "abc"] == ["put"] * 3
    assert sorted(results[2:5]) == ["put", "refused", "refused"]
    assert [each.name for each in now.contributions()] == ["a", "b", "c", "same"]
    assert not list((now.folder / "contributions").glob(".partial-*"))


def test_a_late_contribution_is_told_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    now = meeting.current
    put(meeting, now, "early", place / "base", {})
    fuse(meeting, threads=1, verify=False)
    with pytest.raises(RunError, match="round 0 was fused"):
        put(meeting, now, "late", place / "base", {})
    assert [each.name for each in now.contributions()] == ["early"]


def test_a_fuse_that_was_killed_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    models = [changed_copy(place / "base", place / f"m{index}", index) for index in range(2)]
    for model in models:
        put(meeting, meeting.current, model.name, model, {})

    def killed(done: int, total: int, what: str) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(meeting, threads=1, verify=False, say=killed)
    assert meeting.current.number == 0
    fuse(meeting, threads=1, verify=False)
    parts = [weights_of(model) for model in models]
    for name, tensor in weights_of(meeting.current.model).items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)


def test_a_contribution_that_does_not_fit_or_is_damaged_is_refused(place: Path) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    other = place / "other"
    shutil.copytree(place / "base", other)
    weights = weights_of(other)
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match="norm"):
        put(meeting, meeting.current, "other", other, {})
    put(meeting, meeting.current, "fine", place / "base", {})
    file = meeting.current.contributions()[0].model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(RequestError, match="not what was contributed"):
        fuse(meeting)


def test_what_is_not_finite_is_no_contribution_and_no_start(place: Path) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    broken = changed_copy(place / "base", place / "broken", 0)
    weights = weights_of(broken)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(RequestError, match=r"NaN or infinite numbers in `model.norm.weight`"):
        put(meeting, meeting.current, "broken", broken, {})
    with pytest.raises(RequestError, match="NaN or infinite"):
        begin(place / "other", str(broken))
    assert meeting.current.contributions() == []


def test_a_contribution_that_came_another_way_can_be_taken_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    put(meeting, meeting.current, "fine", place / "base", {})
    put(meeting, meeting.current, "bad", place / "base", {})
    folder = meeting.current.folder / "contributions" / "bad"
    weights = weights_of(folder / "model")
    save_file({name: tensor * torch.nan for name, tensor in weights.items()}, folder / "model" / "model.safetensors", {"format": "pt"})
    note = json.loads((folder / "contribution.json").read_text())
    (folder / "contribution.json").write_text(json.dumps({**note, "sha256": {}}))
    with pytest.raises(GateError, match="ftcli cold remove"):
        fuse(meeting, threads=1, verify=False)
    assert run(["cold", "remove", "meet", "bad"]) == 0
    assert run(["cold", "remove", "meet", "bad"]) == 2
    assert "contributions: fine" in capsys.readouterr().err
    assert fuse(meeting, threads=1, verify=False)["contributions"] == ["fine"]


def test_a_model_of_other_shapes_is_refused_without_a_recipe_that_nobody_wrote(place: Path) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    other = changed_copy(place / "base", place / "other", 0)
    save_file({**weights_of(other), "model.norm.weight": torch.ones(7)}, other / "model.safetensors", {"format": "pt"})
    for model in ("other", "nowhere"):
        with pytest.raises(RequestError) as caught:
            put(meeting, meeting.current, "x", place / model, {})
        assert "cannot be contributed to round 0" in str(caught.value)
        assert "cold.yaml" not in str(caught.value)
        assert "line" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text"), [("cold.json", "[]"), ("cold.json", "{}"), ("rounds/000/contributions/a/contribution.json", "[]")]
)
def test_a_damaged_meeting_place_is_said_to_be_so(file: str, text: str, place: Path) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    put(meeting, meeting.current, "a", place / "base", {})
    (place / "meet" / file).write_text(text)
    with pytest.raises(RequestError, match="json"):
        status(meeting)


def test_pruning_keeps_the_notes(place: Path) -> None:
    meeting = begin(place / "meet", str(place / "base"))
    put(meeting, meeting.current, "a", place / "base", {"steps": 3})
    fuse(meeting, prune=True, threads=1, verify=False)
    (note,) = status(meeting)["rounds"][0]["contributions"]
    assert note["steps"] == 3
    assert not list((place / "meet" / "rounds" / "000" / "contributions").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "base", "--base", "base"], "exists already"),
        (["init", "new", "--base", "nowhere/at/all"], "is no folder"),
        (["status", "base"], "no cold.json"),
        (["fuse", "nothing"], "no cold.json"),
        (["contribute", "meet"], "both or none"),
        (["contribute", "meet", "--model", "base", "--name", "../x"], "letters"),
        (["contribute", "meet", "--recipe", "nothing.yaml"], "does not exist"),
    ],
)
def test_a_wrong_request_is_refused(arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(place / "meet", str(place / "base"))
    assert run(["cold", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert Meeting(place / "meet").current.contributions() == []
    assert Meeting(place / "meet").current.number == 0
