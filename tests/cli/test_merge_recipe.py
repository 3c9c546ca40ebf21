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


SEARCH = """merge_method: search
base_model: base
models: [a, b]
search:
  method: linear
  ranges: {weight: [0, 1]}
evaluate:
  sources: [{name: x, source: {kind: file, path: rows.jsonl}}]
"""
SOUP = "merge_method: lora_svd\nmodels:\n  - {model: l, parameters: {weight: 1}}\n  - {model: m}\nparameters:\n  rank: 3\n"
FAULTY = {
    "missing": (SEARCH, "rows.jsonl (line 8, column 44): there is no such file"),
    "soup": (
        SEARCH.replace("search", "greedy_soup", 1).replace("base_model: base\n", "").replace("search:\n", "serch:\n"),
        "serch (line 3",
    ),
    "range": (SEARCH.replace("weight:", "weigh:"), "search.ranges.weigh (line 6, column 12): `linear` has no such parameter"),
    "ends": (SEARCH.replace("[0, 1]", "[1, 0]"), "search.ranges.weight (line 6, column 12)"),
    "groups": (SEARCH.replace("ranges", "layer_groups: 9\n  ranges"), "search.layer_groups (line 6, column 3): 9 is more"),
    "weight": (SOUP.replace("1}", "many}"), "models.0.parameters.weight (line 3, column 29): found `many`"),
    "rank": (SOUP.replace("3", "0"), "parameters.rank (line 6, column 3): found `0`"),
    "key": (SOUP.replace("rank", "rnak"), "parameters.rnak (line 6, column 3): unknown parameter"),
}


def test_special_recipes_are_refused_with_line_and_column_before_torch_is_loaded(folder: Path) -> None:
    for name, (recipe, _) in FAULTY.items():
        (folder / f"{name}.yaml").write_text(recipe)
    write_word_tokenizer(folder / "a")
    code = (
        "import sys, time\nfrom ftcli.cli.main import run\n"
        f"for name in {list(FAULTY)!r}:\n"
        "    started = time.process_time()\n"
        "    code = run(['merge', f'{name}.yaml', '-o', 'out'])\n"
        "    heavy = sorted({'torch', 'transformers', 'peft'} & set(sys.modules))\n"
        "    print(name, code, heavy, time.process_time() - started < 1, flush=True)\n"
        "    print('== end of', name, file=sys.stderr, flush=True)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines() == [f"{name} 2 [] True" for name in FAULTY]
    for name, (_, message) in FAULTY.items():
        said = finished.stderr.partition(f"== end of {name}")[0].rpartition("== end of")[2]
        assert message in said, f"{name}: {said}"
    assert not (folder / "out").exists()


def write_word_tokenizer(folder: Path) -> None:
    words = {f"w{row}": row for row in range(40)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))


def test_two_merges_into_one_folder_end_with_one_model_and_one_refusal(folder: Path) -> None:
    other = RECIPE.replace("weight: 0.5", "weight: 0.9")
    (folder / "other.yaml").write_text(other)
    slow = (
        "import sys, time, ftcli.merging.engine as engine\nfrom ftcli.cli.main import run\nmerge = engine._Work.merge\n"
        "def slow(self, tensor):\n    time.sleep(0.1)\n    merge(self, tensor)\n"
        "engine._Work.merge = slow\nsys.exit(run(['merge', 'recipe.yaml', '-o', 'out', '--no-verify', '--threads', '1']))\n"
    )
    first = subprocess.Popen([sys.executable, "-c", slow], cwd=folder, stderr=subprocess.PIPE, text=True)
    while not (folder / ".merging-out" / "journal.jsonl").is_file():
        assert first.poll() is None
        time.sleep(0.01)
    assert run(["merge", "other.yaml", "-o", "out", "--no-verify"]) == 2
    assert first.wait() == 0
    assert (folder / "out" / "merge_recipe.yaml").read_text() == RECIPE


def test_a_merge_that_was_interrupted_says_what_is_left_and_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ftcli.merging.engine._Work.merge", interrupted)
        assert run(["merge", "recipe.yaml", "-o", "out"]) == 130
    captured = capsys.readouterr()
    assert "`.merging-out` keeps what was merged: --resume goes on with it" in captured.out + captured.err
    assert run(["merge", "recipe.yaml", "-o", "out", "--resume", "--no-verify"]) == 0
    assert "keeps what was merged" not in capsys.readouterr().out
    assert not (folder / ".merging-out").exists()


def test_a_search_that_was_interrupted_says_what_is_left(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(recipe: object, text: str, path: Path, output: Path, work_folder: Path, **_: object) -> None:
        (work_folder / "evaluations.jsonl").write_text("{}")
        raise KeyboardInterrupt

    (folder / "search.yaml").write_text(SEARCH)
    monkeypatch.setattr("ftcli.merging.search.run._run", interrupted)
    assert run(["merge", "search.yaml", "-o", "out"]) == 130
    captured = capsys.readouterr()
    assert "`.search-out` keeps what was measured: the same command goes on with it" in captured.out + captured.err
