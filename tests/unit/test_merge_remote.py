"""Models on the hub are planned from headers; their weights come only when the plan holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from tests.merge_models import LLAMA, family, read_values

from ftcli.errors import RecipeError
from ftcli.merging.outcome import merge_models, plan_lines
from ftcli.merging.plan import plan_merge
from ftcli.merging.recipe import load_merge_recipe
from ftcli.merging.stored import SINGLE_FILE, folder_tensors

COMMIT = "c0ffee"


class FakeHub:
    """Folders that pass for repositories, and a record of what was asked of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[tuple[str, str]]()

    def snapshot_download(self, repository: str, *, revision: str | None, allow_patterns: Sequence[str]) -> str:
        whole = "*.safetensors" in allow_patterns
        self.asked.append((repository, "weights" if whole else "small files"))
        target = self.folder / "cache" / repository.replace("/", "--") / COMMIT
        target.mkdir(parents=True, exist_ok=True)
        for path in (self.folder / "hub" / repository.split("/")[1]).iterdir():
            if whole or path.suffix != ".safetensors":
                shutil.copyfile(path, target / path.name)
        return str(target)

    def get_safetensors_metadata(self, repository: str, *, revision: str) -> SafetensorsRepoMetadata:
        assert revision == COMMIT
        self.asked.append((repository, "headers"))
        folder = self.folder / "hub" / repository.split("/")[1]
        if not (folder / SINGLE_FILE).is_file():
            raise NotASafetensorsRepoError(repository)
        tensors = {
            name: TensorInfo(dtype=tensor.dtype, shape=list(tensor.shape), data_offsets=(0, tensor.num_bytes))  # type: ignore[arg-type]
            for name, tensor in folder_tensors(folder).items()
        }
        file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        return SafetensorsRepoMetadata(None, False, dict.fromkeys(tensors, SINGLE_FILE), {SINGLE_FILE: file})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    family(tmp_path / "hub", count=2)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fake.get_safetensors_metadata)
    return fake


def write_recipe(folder: Path, **more: Any) -> Path:
    models = [{"model": f"org/{name}", "parameters": {"weight": 0.5}} for name in ("a", "b")]
    path = folder / "r.yaml"
    path.write_text(json.dumps({"merge_method": "task_arithmetic", "base_model": "org/base", "models": models, **more}))
    return path


def test_a_plan_reads_headers_and_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    plan = plan_merge(load_merge_recipe(write_recipe(tmp_path)), tmp_path / "out")
    assert {what for _, what in hub.asked} == {"small files", "headers"}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert any(line.startswith("fetches ") for line in plan_lines(plan))


def test_weights_come_once_the_plan_holds_and_the_result_is_that_of_folders(hub: FakeHub, tmp_path: Path) -> None:
    merge_models(write_recipe(tmp_path), tmp_path / "out", verify=False)
    assert [what for _, what in hub.asked[-3:]] == ["weights"] * 3
    local = [{"model": f"hub/{name}", "parameters": {"weight": 0.5}} for name in ("a", "b")]
    path = write_recipe(tmp_path, base_model="hub/base", models=local)
    merge_models(path, tmp_path / "local", verify=False)
    first, second = read_values(tmp_path / "out"), read_values(tmp_path / "local")
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    # what is here is not asked for again
    hub.asked.clear()
    plan_merge(load_merge_recipe(write_recipe(tmp_path)), tmp_path / "other")
    assert {what for _, what in hub.asked} <= {"small files", "weights"}


def test_models_that_do_not_fit_are_refused_before_any_weights_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "hub" / "b")
    family(tmp_path / "wide", count=2, config={**LLAMA, "intermediate_size": 32})
    shutil.copytree(tmp_path / "wide" / "b", tmp_path / "hub" / "b")
    with pytest.raises(RecipeError) as caught:
        merge_models(write_recipe(tmp_path), tmp_path / "out")
    assert any("shapes differ" in problem.what for problem in caught.value.problems)
    assert "weights" not in {what for _, what in hub.asked}


def test_pickled_weights_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "hub" / "b" / SINGLE_FILE).unlink()
    with pytest.raises(RecipeError) as caught:
        plan_merge(load_merge_recipe(write_recipe(tmp_path)))
    assert "no safetensors weights" in str(caught.value.problems[0].what)


def test_weights_that_are_not_what_the_headers_said_are_refused(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.errors import RequestError

    plan = plan_merge(load_merge_recipe(write_recipe(tmp_path)))
    family(tmp_path / "wide", count=2, config={**LLAMA, "intermediate_size": 32})
    shutil.copyfile(tmp_path / "wide" / "b" / SINGLE_FILE, tmp_path / "hub" / "b" / SINGLE_FILE)
    from ftcli.merging.remote import fetched

    with pytest.raises(RequestError, match="cannot be had"):
        fetched(plan)


def test_the_card_names_as_bases_what_came_from_the_hub_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    family(tmp_path / "owner", count=1)
    (tmp_path / "owner" / "a").rename(tmp_path / "owner" / "here")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("merge_method: linear\nmodels: [org/a@main, org/b, owner/here]\nparameters: {weight: 1}\n")
    merge_models(recipe, tmp_path / "out", verify=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model:\n- org/a\n- org/b\nbase_model_relation: merge\n")
    assert "| org/a@main | model |" in card
    assert "| here | model |" in card
