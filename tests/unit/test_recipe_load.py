"""The words a user reads when a recipe is wrong, one by one."""

# ruff: noqa: E501  a message is compared on the line of the mistake that gives it

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from ftcli.errors import RecipeError
from ftcli.recipe.explain import FOREIGN_KEYS
from ftcli.recipe.load import LoadedRecipe, load_recipe
from ftcli.recipe.schema import homes

GOOD = """\
version: 1
name: orders
model: {base: "builtin:tiny"}
data:
  train:
    - {source: {kind: file, path: orders.jsonl}, format: {kind: chat}}
method: {kind: lora, rank: 16}
train:
  schedule: {kind: cosine}
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes `sft.yaml` in the current folder."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str) -> Path:
        Path("sft.yaml").write_text(text, encoding="utf-8")
        return Path("sft.yaml")

    return _write


def load_with(write: Write, *, replace: tuple[str, str] | None = None, overrides: tuple[str, ...] = ()) -> LoadedRecipe:
    if replace is not None:
        assert replace[0] in GOOD
    return load_recipe(write(GOOD.replace(*replace) if replace else GOOD), overrides)


def error_of(write: Write, *, replace: tuple[str, str] | None = None, overrides: tuple[str, ...] = ()) -> str:
    """The message without its first line, blank lines and indentation."""
    with pytest.raises(RecipeError) as caught:
        load_with(write, replace=replace, overrides=overrides)
    return textwrap.dedent("\n".join(line for line in str(caught.value).split("\n")[1:] if line))


def test_two_misspellings_are_reported_together_in_the_words_of_the_design(write: Write) -> None:
    text = GOOD.replace("rank: 16", "rnak: 16").replace("kind: cosine", "kind: cosin")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))
    assert str(caught.value) == textwrap.dedent(
        """\
        recipe `sft.yaml` has 2 problems

          method.rnak (line 7, column 22): unknown key
            hint: did you mean `rank`?

          train.schedule (line 9, column 3): unknown kind `cosin`
            hint: did you mean `cosine`?"""
    )
    assert caught.value.exit_code == 2


def test_a_good_recipe_loads_and_its_paths_count_from_its_folder(write: Write, tmp_path: Path) -> None:
    path = write(GOOD)
    loaded = load_recipe(path)
    assert loaded.recipe.data.train[0].source.path == str(tmp_path / "orders.jsonl")
    assert loaded.text == GOOD
    assert loaded.document["method"] == {"kind": "lora", "rank": 16}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: orders", "nmae: orders", "missing key `name`\n  hint: `name`: names the run and its folder: letters, digits, dots, dashes, underscores\nnmae (line 2, column 1): unknown key\n  hint: did you mean `name`?"),
        ("model: {", "lr: 1e-4\nmodel: {", "lr (line 3, column 1): unknown key\n  hint: `lr` belongs under `train`"),
        ("rank: 16", "wibble: 16", "method.wibble (line 7, column 22): unknown key\n  hint: keys here: rank, alpha,"),
        ("rank: 16", "lr: 16", "method.lr (line 7, column 22): unknown key\n  hint: `lr` belongs under `train`"),
        (
            "lora, rank: 16",
            "full, rank: 16",
            "method.rank (line 7, column 22): unknown key\n  hint: `rank` belongs to kind `adalora`, `lora`, `qlora`, not `full`",
        ),
        ("{kind: cosine}", "{kind: cosine}\n  warmup_steps: 3", "train.warmup_steps (line 10, column 3): unknown key\n  hint: `warmup_steps` belongs under"),
        ("schedule:", "learning_rate: 1e-4\n  schedule:", "train.learning_rate (line 9, column 3): unknown key\n  hint: it is called `train.lr` here"),
        ("method:", "  evaluation: [{source: {kind: file, path: x}, generate: {metrics: exact-match}}]\nmethod:", "hint: put it in brackets: `[{kind: exact-match}]`"),
        ("rank: 16", "lora_r: 16", "hint: it is called `method.rank` here"),
        ("schedule:", "sample_packing: true\n  schedule:", "hint: batches have no padding"),
        ("kind: lora, rank: 16", "kind: dora", "method (line 7, column 1): unknown kind `dora`\n  hint: write `{kind: lora, variant: dora}`"),
        ('{base: "builtin:tiny"}', '"builtin:tiny"', "model (line 3, column 1): found text `builtin:tiny`, allowed: a mapping\n  hint: write `{base: \"builtin:tiny\"}`"),
        ("{kind: file, path: orders.jsonl}", "orders.jsonl", "hint: write `{kind: builtin, name: ...}` or `{kind: file, path: ...}` or `{kind: hub, dataset: ...}`"),
        ("train:\n    - {", "train:\n      {", "found a mapping (source, format), allowed: a list with at least 1 entry\n  hint: begin every entry with `- `"),
        ("{kind: lora, rank: 16}", "", "method (line 7, column 1): found nothing (null), allowed: a mapping with `kind` adalora, adamix, adapter,"),
        ("- {source", "- {name: '', source", "data.train.0.name (line 6, column 8): found an empty text, allowed: a name"),
        ("rank: 16", "rank: on", "method.rank (line 7, column 22): found text `on`, allowed: a whole number, at least 1"),
        ("rank: 16", "rank: '16'", "found text `16`, allowed: a whole number, at least 1\n  hint: write it without quotes"),
        ("rank: 16", "rank: 1e1", "method.rank (line 7, column 22): found `10.0`, allowed: a whole number, at least 1\n  hint: write 10"),
        ("rank: 16", "rank: 0", "method.rank (line 7, column 22): found `0`, allowed: a whole number, at least 1"),
        ("rank: 16", "rank: true", "method.rank (line 7, column 22): found `true`, allowed: a whole number, at least 1"),
        ("rank: 16", "rank: '${RANK}'", "hint: `${...}` is replaced in paths and names only"),
        ("rank: 16", "rank: null", "method.rank (line 7, column 22): found nothing (null), allowed: a whole number, at least 1"),
        ("rank: 16", "target_modules: q_proj", "method.target_modules (line 7, column 22): found text `q_proj`, allowed: all-linear or a list"),
        ("rank: 16", "target_modules: []", "an empty list: nothing would be adapted\n  hint: `all-linear`, or names such as"),
        ("rank: 16", "target_modules: [1]", "method.target_modules.0 (line 7, column 39): found `1`, allowed: text\n  hint: put it in quotes: \"1\""),
        ("schedule:", "gradient_checkpointing: on\n  schedule:", "found text `on`, allowed: true or false\n  hint: write true"),
        ("schedule:", "gradient_checkpointing: 0\n  schedule:", "found `0`, allowed: true or false\n  hint: write false"),
        ("schedule:", "mixed_precision: bf-16\n  schedule:", "allowed: auto, no, bf16 or fp16\n  hint: did you mean `bf16`?"),
        ("schedule:", "lr: 0\n  schedule:", "train.lr (line 9, column 3): found `0`, allowed: a number above 0"),
        ("schedule:", "lr: \"1e-4\"\n  schedule:", "found text `1e-4`, allowed: a number above 0\n  hint: write it without quotes"),
        ("schedule:", "optimizer: adamw\n  schedule:", "or sgd\n  hint: write `{kind: adamw}`"),
        ("{kind: cosine}", "{}", "train.schedule (line 9, column 3): missing key `kind`\n  hint: kinds: constant, cosine, infinite, linear, rewarm, wsd"),
        ("{kind: cosine}", "{kind: 3}", "train.schedule (line 9, column 3): unknown kind `3`\n  hint: kinds: constant, cosine, infinite, linear, rewarm, wsd"),
        ("kind: chat", "kind: spam", "data.train.0.format (line 6, column 50): unknown kind `spam`\n  hint: kinds: chat, completion, instruction, label, text"),
        ("path: orders.jsonl", "path: ${DATA}/x", "line 6, column 36: expected `,` or `}`, but got `{`\n  hint: between brackets a text with `${...}` needs quotes"),
        ("name: orders", "name: two words", "name (line 2, column 1): found `two words`, allowed: letters of a to z, digits, dots, dashes and underscores"),
        ("name: orders", "name: ''", "name (line 2, column 1): found an empty text, allowed: letters of a to z"),
        ("name: orders", "name: 3", "name (line 2, column 1): found `3`, allowed: text\n  hint: put it in quotes: \"3\""),
        ("name: orders", "name: x-${NO_SUCH_VARIABLE}", "name (line 2, column 1): environment variable NO_SUCH_VARIABLE is not set"),
        ("name: orders", "name: orders\ntrackers: wandb", "trackers (line 3, column 1): found text `wandb`, allowed: a list\n  hint: put it in brackets: `[wandb]`"),
        ("name: orders", "name: orders\ntrackers: [wandbb]", "trackers.0 (line 3, column 12): found text `wandbb`, allowed: tensorboard, wandb or mlflow"),
        ("version: 1", "version: 2", "version (line 1, column 1): found `2`, allowed: 1"),
        ("path: orders.jsonl", "path: '${NO_SUCH_VARIABLE}/x'", "data.train.0.source.path (line 6, column 29): environment variable NO_SUCH_VARIABLE is not set"),
        ("    - {source: {kind: file, path: orders.jsonl}, format: {kind: chat}}", "    []", "data.train (line 5, column 3): found an empty list, allowed: a list with at least 1 entry"),
        ('{base: "builtin:tiny"}', "{}", "model (line 3, column 1): neither `base` nor `init` is given\n  hint: `base: builtin:tiny`"),
        ('{base: "builtin:tiny"}', "{base: x, init: {architecture: llama}}", "model.init (line 3, column 18): `base` and `init` are both given"),
        ('{base: "builtin:tiny"}', "{init: {architecture: llama}}", "model.init (line 3, column 9): `init` needs `model.tokenizer`"),
        ('"builtin:tiny"', '"builtin:tiny", revision: main', "model.revision (line 3, column 31): `revision` is read for hub ids only"),
        ("schedule:", "epochs: 1\n  steps: 3\n  schedule:", "train.steps (line 10, column 3): `epochs` and `steps` are both given\n  hint: keep one of the two"),
        ("{kind: cosine}", "{kind: cosine, warmup_steps: 3, warmup_ratio: 0.1}", "`warmup_steps` and `warmup_ratio` are both given"),
        ("{kind: cosine}", "{kind: cosine, warmup_steps: 9}\n  steps: 8", "the warm-up of 9 steps is longer than `train.steps` (8)\n  hint: at most 8"),
        ("schedule:", "early_stopping: {}\n  schedule:", "`early_stopping` needs evaluations during training\n  hint: give `every.evaluate`"),
        ("method:", "  holdout: 0\nevery: {evaluate: 9}\nmethod:", "every.evaluate (line 8, column 9): there is nothing to evaluate\n  hint: give `data.evaluation`"),
        (
            "method:",
            "  evaluation:\n" + "    - {name: a, source: {kind: file, path: x.txt}}\n" * 2 + "method:",
            "data.evaluation.1.name (line 9, column 8): `a` is the name of data.evaluation.0, too",
        ),
    ],
)  # fmt: skip
def test_each_mistake_has_its_words(write: Write, old: str, new: str, message: str) -> None:
    assert message in error_of(write, replace=(old, new))


def test_problems_come_in_the_order_of_the_lines(write: Write) -> None:
    text = GOOD.replace("rank: 16", "rank: 0, rnak: 1").replace("name: orders", "name: ''\nname: b")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text + "seed: 3\n"))
    assert [problem.where for problem in caught.value.problems] == [
        "name (line 2, column 1)",
        "name (line 3, column 1)",
        "method.rank (line 8, column 22)",
        "method.rnak (line 8, column 31)",
        "seed (line 11, column 1)",
    ]


def test_numbers_of_yaml_1_2_are_numbers(write: Write) -> None:
    recipe = load_with(write, replace=("schedule:", "lr: 1e-5\n  max_grad_norm: 2E0\n  schedule:")).recipe
    assert (recipe.train.lr, recipe.train.max_grad_norm) == (1e-5, 2.0)


def test_variables_are_replaced_in_paths_and_kept_as_text_elsewhere(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    changed = "path: '${DATA}/orders.jsonl'}, format: {kind: chat, messages: '${DATA}'"
    recipe = load_with(write, replace=("path: orders.jsonl}, format: {kind: chat", changed)).recipe
    assert recipe.data.train[0].source.path == "/data/orders.jsonl"
    assert recipe.data.train[0].format.messages == "${DATA}"


def test_variables_are_replaced_in_names_and_the_name_is_checked_after_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "ada")
    recipe = load_with(write, replace=("name: orders", "name: ${WHO}-orders"), overrides=("data.train.0.name=${WHO}",)).recipe
    assert (recipe.name, recipe.data.train[0].name) == ("ada-orders", "ada")
    monkeypatch.setenv("WHO", "ada lovelace")
    message = "name (line 2, column 1): found `ada lovelace-orders` (from `${WHO}-orders`), allowed: letters of a to z, digits"
    assert message in error_of(write, replace=("name: orders", "name: ${WHO}-orders"))


def test_overrides_change_the_document_and_are_validated_like_it(write: Write) -> None:
    overrides = ("train.lr=1e-4", "method.rank=8", "data.train.0.weight=2", "every={log: 1, save: 5}", "train.schedule.warmup_ratio=0.1")
    recipe = load_with(write, overrides=overrides).recipe
    assert (recipe.train.lr, recipe.method.rank, recipe.data.train[0].weight) == (1e-4, 8, 2.0)
    assert (recipe.every.log, recipe.every.save, recipe.train.schedule.warmup_ratio) == (1, 5, 0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "--set train.lrr: unknown key\n  hint: did you mean `lr`?"),
        ("train.lr=high", "--set train.lr: found text `high`, allowed: a number above 0"),
        ("optimizer.kind=lion", "--set optimizer.kind: unknown key\n  hint: `optimizer` belongs under `train`"),
        ("objective.prompt_loss_weight=2", "--set objective.prompt_loss_weight"),
        ("method.kind=prefix_tuning", "--set method.kind: unknown kind `prefix_tuning`\n  hint: it is called `prefix` here"),
        ("method.learning=true", "--set method.learning: unknown key\n  hint: keys here: rank, "),
        ("method.kind=lroa", "--set method.kind: unknown kind `lroa`\n  hint: did you mean `lora`?"),
        ("data.train.4.weight=2", "--set data.train.4.weight: no entry `4` in `data.train`\n  hint: it has entries 0 to 0"),
        ("name.x=2", "--set name.x: `name` is text `orders`, not a mapping"),
        ("method={kind: lora, rnak: 3}", "method.rnak (--set method): unknown key\n  hint: did you mean `rank`?"),
        ("train.lr", "--set train.lr: has no `=`\n  hint: --set train.lr=1e-4"),
        ("=3", "--set =3: has no key"),
        ("every.log=[1", "--set every.log: `[1`: expected `,` or `]`"),
    ],
)
def test_an_override_that_is_wrong_is_named_like_it_was_typed(write: Write, override: str, message: str) -> None:
    assert message in error_of(write, overrides=(override,))


@pytest.mark.parametrize(("foreign", "own"), FOREIGN_KEYS.items())
def test_a_key_of_another_trainer_leads_to_a_key_that_there_is(foreign: str, own: str) -> None:
    *parents, key = own.split(".")
    assert tuple(parents) in [path for path, _ in homes()[key]]
    assert foreign not in homes(), "it is a key of ours"


def test_problems_of_the_file_and_of_overrides_come_together(write: Write) -> None:
    text = error_of(write, replace=("rank: 16", "rnak: 16"), overrides=("train.lr=0", "train.x"))
    assert text.index("method.rnak (line 7, column 22)") < text.index("--set train.x") < text.index("--set train.lr")


def test_a_missing_file_names_its_neighbour(write: Write) -> None:
    write(GOOD)
    with pytest.raises(RecipeError, match=r"recipe `sft.yml` does not exist\n  hint: did you mean `sft.yaml`\?"):
        load_recipe(Path("sft.yml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the document is empty"),
        (b"name: caf\xe9\n", "byte 9 (line 1): 0xe9 is not UTF-8"),
        (b"x" * (2**20 + 1), "no recipe is larger than 1.0 MiB"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_a_recipe_that_fails_imports_nothing_heavy_and_takes_no_time(write: Write) -> None:
    path = write(GOOD.replace("rank", "rnak"))
    code = f"""
import sys
from pathlib import Path
from ftcli.errors import RecipeError
from ftcli.recipe.load import load_recipe
try:
    load_recipe(Path({str(path)!r}))
except RecipeError:
    print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"torch", "transformers", "peft", "datasets", "pyarrow", "rich", "numpy"}}))
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    # processor time, which a busy machine does not stretch
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1
