"""`ftcli merge RECIPE.yaml`: what it prints, what it refuses, and that it needs no torch to say so."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.merge_models import family

from ftcli.cli.main import run

RECIPE = "merge_method: ties\nbase_model: base\nmodels: [a, b]\nparameters: {weight: 0.5, density: 0.5}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    family(tmp_path, count=2)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_merge_says_what_it_did_and_leaves_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "recipe.yaml", "-o", "out", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["method"] == "ties"
    assert [proof["passed"] for proof in report["proofs"]] == [True, True]
    assert "merged 30 tensors" in captured.err
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"README.md", "config.json", "manifest.json", "merge_recipe.yaml", "model.safetensors"}
    assert "loads and runs" in (folder / "out" / "README.md").read_text()


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in folder.iterdir()}
    assert run(["merge", "recipe.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "30 tensors" in out
    assert "model.layers.*.mlp.up_proj.weight (x3)  [24, 16] BF16  a + b  weight=0.5,0.5" in out
    assert run(["merge", "recipe.yaml", "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 30
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml"], "there is no place for the merged model"),
        (["recipe.yaml", "-o", "a"], "`a` exists already"),
        (["recipe.yaml", "-o", "out", "--dtype", "float16"], "--dtype is not for a merge recipe"),
        (["recipe.yaml", "-o", "out", "--resume"], "nothing to go on with"),
        (["runs/a", "--dry-run"], "--dry-run is only for a merge recipe"),
        (["recpe.yaml", "-o", "out"], "merge recipe `recpe.yaml` does not exist"),
        (["recipe.yaml", "-o", "out", "--threads", "0"], "threads"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_wrong_recipe_is_refused_with_file_and_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.replace("density", "densty"))
    assert run(["merge", "recipe.yaml", "-o", "out", "--json"]) == 2
    captured = capsys.readouterr()
    assert "merge recipe `recipe.yaml` has 1 problem" in captured.err
    assert "parameters.densty (line 4" in captured.err
    assert json.loads(captured.out)["error"]["problems"][0]["hint"] == "did you mean `density`?"


def test_neither_the_plan_nor_the_merge_loads_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom ftcli.cli.main import run\n"
        "assert run(['merge', 'recipe.yaml', '-o', 'out', '--no-verify']) == 0\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    started = time.perf_counter()
    finished = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"
    assert time.perf_counter() - started < 10
    assert (folder / "out" / "model.safetensors").is_file()
