"""`ftcli init` looks before it writes, and what it writes loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftcli.cli.main import run
from ftcli.data.formats.chat import Chat
from ftcli.data.formats.text import Text
from ftcli.data.sources.file import File
from ftcli.recipe.draft import DataLook, plan
from ftcli.recipe.load import load_recipe
from ftcli.recipe.recipe import Recipe

Init = Callable[..., int]


def chats(number: int, characters: int = 10) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": "a" * characters}, {"role": "assistant", "content": f"{i}"}]} for i in range(number)]


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Callable[..., Path]) -> Init:
    """Runs `ftcli init` in a folder with a model `tokenizer` of 300 positions and the given rows as `data.jsonl`."""
    folder = tokenizer_folder(tokens=("<|im_start|>", "<|im_end|>"))
    (folder / "config.json").write_text('{"max_position_embeddings": 300}')
    monkeypatch.chdir(tmp_path)

    def _init(rows: list[dict[str, Any]], *arguments: str) -> int:
        Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return run(["init", "--model", "tokenizer", "--data", "data.jsonl", *arguments])

    return _init


def written(path: str = "recipe.yaml") -> Recipe:
    return load_recipe(Path(path)).recipe


def test_the_first_recipe_loads_and_names_what_was_found(init: Init, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert init(chats(120)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "model       tokenizer: vocabulary of 260, 300 positions, chat template: none, `chatml` of ftcli fits",
        "data        data: 120 rows, format chat (messages), tokens: median 33, 95 % up to 34, longest about 34",
        "wrote recipe.yaml, and recipe.schema.json for your editor",
        "next: ftcli check recipe.yaml",
    ]
    text = Path("recipe.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert json.loads(Path("recipe.schema.json").read_text())["title"] == "ftcli recipe"
    recipe = written()
    assert recipe.model.base == str(tmp_path / "tokenizer")
    assert recipe.model.template == "chatml"
    assert recipe.data.train[0].source == File(path="data.jsonl")
    assert recipe.data.train[0].format == Chat()
    assert (recipe.data.max_length, recipe.data.on_overflow) == (64, "auto")
    assert recipe.method.kind == "lora"


def test_a_recipe_in_another_folder_names_its_files_from_there(init: Init, tmp_path: Path) -> None:
    Path("deep").mkdir()
    assert init(chats(9), "-o", "deep/r.yaml", "--method", "full", "--eval", "data.jsonl") == 0
    assert "path: ../data.jsonl" in Path("deep/r.yaml").read_text()
    recipe = written("deep/r.yaml")
    assert recipe.data.train[0].source.path == recipe.data.evaluation[0].source.path == str(tmp_path / "data.jsonl")
    assert recipe.method.kind == "full"


def test_an_outlier_is_dropped_instead_of_setting_the_length(init: Init) -> None:
    assert init([*chats(60), *chats(1, characters=53_000)]) == 0
    recipe = written()
    assert (recipe.data.max_length, recipe.data.on_overflow) == (64, "drop")


def test_no_row_is_given_more_tokens_than_the_model_has_positions(init: Init) -> None:
    assert init(chats(60, characters=900)) == 0
    assert (written().data.max_length, written().data.on_overflow) == (300, "drop")
    assert "the model has no more positions" in Path("recipe.yaml").read_text()


def test_columns_with_other_names_are_written_down(init: Init) -> None:
    assert init([{"conversations": row["messages"]} for row in chats(9)]) == 0
    assert written().data.train[0].format == Chat(messages="conversations")


def test_a_recipe_that_is_there_is_not_replaced(init: Init, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("mine")
    assert init(chats(9)) == 2
    assert Path("recipe.yaml").read_text() == "mine"
    expected = "error: `recipe.yaml` is there already\n  hint: --force replaces it, --output writes to another file\n"
    assert capsys.readouterr().err == expected
    assert init(chats(9), "--force") == 0
    assert written().version == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lroa"), "error: unknown method `lroa`\n  hint: did you mean `lora`?\n"),
        (("--model", "./tokeniser"), "hint: did you mean `tokenizer`?"),
        (("--data", "dta.jsonl"), "hint: did you mean `"),
        (("-o", "nowhere/r.yaml"), "error: `nowhere/r.yaml` cannot be written: no such file or directory\n"),
    ],
)
def test_what_is_not_there_is_said_and_nothing_is_written(
    init: Init, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(chats(9), *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("*r*.yaml"))


def look(num_rows: int, *, p95: int = 100, longest: int = 120, is_text: bool = False) -> DataLook:
    return DataLook(File(path="x.jsonl"), Text() if is_text else Chat(), num_rows, True, median=p95, p95=p95, longest=longest)


@pytest.mark.parametrize(
    ("data", "epochs", "batch", "interval"),
    [(look(1), 5, 1, 1), (look(7), 5, 7, 1), (look(300), 3, 8, 20), (look(1000), 2, 16, 20), (look(50_000), 1, 32, 310)],
)
def test_numbers_fit_the_rows(data: DataLook, epochs: int, batch: int, interval: int) -> None:
    numbers = plan(data, context=2048)
    assert (numbers.epochs, numbers.global_batch_size, numbers.interval) == (epochs, batch, interval)
    assert numbers.max_length == 128


def test_long_texts_are_many_examples_and_are_never_dropped() -> None:
    numbers = plan(look(10, p95=51_200, longest=900_000, is_text=True), context=512)
    assert (numbers.max_length, numbers.drops, numbers.epochs) == (512, False, 1)
    assert numbers.global_batch_size == 16, "10 texts of 51,200 tokens are 1,000 examples"


@pytest.mark.real
def test_every_real_format_gets_a_recipe_that_loads(shared: Path, tmp_path: Path) -> None:
    for path in sorted((shared / "data" / "formats").iterdir()):
        output = tmp_path / f"{path.name}.yaml"
        assert run(["init", "--model", str(shared / "models" / "stories260K"), "--data", str(path), "-o", str(output)]) == 0
        assert load_recipe(output).recipe.data.train[0].format is not None
