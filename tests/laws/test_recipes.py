"""Law 12: every file in recipes/ loads; every smoke recipe trains, resumes, merges or says why not, and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftcli.cli.main import run
from ftcli.data.formats import Format
from ftcli.data.mixtures import Mixture
from ftcli.data.sources import Source
from ftcli.methods import Method
from ftcli.metrics import Metric
from ftcli.models.grow import Grow
from ftcli.objectives import Objective
from ftcli.objectives.regularize import Regularizer
from ftcli.optim.optimizers import Optimizer
from ftcli.optim.schedules import Schedule
from ftcli.recipe.load import load_recipe
from tests.conftest import ROOT
from tests.laws.registered import union_members

# Comparisons of approaches are files of another kind: tests/unit/test_approaches.py loads them.
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("[!.]*.yaml") if not path.name.startswith(("compare-", "chain-")))
SMOKE = sorted((ROOT / "recipes" / "smoke").glob("*.yaml"))
# A smoke recipe reads what comes with the package or lies beside it: no network.
NOT_IN_SMOKE = {"hub"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_loads_and_tells_editors_its_schema(path: Path) -> None:
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    schema = first_line.removeprefix("# yaml-language-server: $schema=")
    assert schema != first_line
    assert (path.parent / schema).resolve() == ROOT / "recipe.schema.json"
    load_recipe(path)


def test_smoke_recipes_use_every_kind_that_is_registered() -> None:
    unions = (Method, Objective, Source, Format, Mixture, Metric, Optimizer, Regularizer, Schedule, Grow)
    registered = {member.model_fields["kind"].default for union in unions for member in union_members(union)}
    used = {kind for path in SMOKE for kind in kinds(load_recipe(path).recipe.model_dump())}
    assert registered - used == NOT_IN_SMOKE


def kinds(value: Any) -> Iterator[str]:
    """Every `kind` in a dumped recipe, defaults included."""
    if isinstance(value, dict):
        yield from ([value["kind"]] if "kind" in value else [])
        for item in value.values():
            yield from kinds(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from kinds(item)


@pytest.mark.parametrize("path", SMOKE, ids=lambda path: path.stem)
def test_every_smoke_recipe_trains_resumes_merges_or_says_why_not_and_answers(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs") / yaml.safe_load(path.read_text())["name"]

    assert run(["train", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["status"] == "finished"
    assert all(proof["passed"] for proof in summary["proofs"] if proof["name"] != "generation stops")
    metrics = (folder / "metrics.jsonl").read_bytes()

    assert run(["train", str(path), "--resume"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == metrics

    if run(["merge", str(folder)]) == 0:
        assert (folder / "merged" / "model.safetensors").is_file()
        assert (folder / "merged" / "tokenizer.json").is_file()
    else:
        assert "error: " in capsys.readouterr().err
        assert not (folder / "merged").exists()
    capsys.readouterr()

    if load_recipe(path).recipe.objective.kind == "classification":
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"text": "Once upon a time"}\n{"text": "there was a mill"}\n')
        assert run(["predict", str(folder), "--data", str(rows)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        return
    assert run(["generate", str(folder), "Once upon a time", "--raw", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
