"""What the user reads when the input is wrong: exit code 2, the exact message, no traceback, nothing trained and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT

from ftcli.cli.main import run

RECIPE = """version: 1
name: bad
model: {base: "BASE"MODEL}
data:
  train:
    - {source: {kind: file, path: PATH}FORMAT}
method: {kind: lora, rank: 8}
train: {steps: 2}
output: run
"""
USER_ONLY = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
NO_END = "{% for m in messages %}{{ m.content }}{% endfor %}"


def chat(question: str, answer: str, **turn: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **turn}]}


CHATS = [chat(f"How many eggs are {n} eggs?", f"{n} eggs") for n in range(3)]
ROW_OF_53_KB = chat("Read this: " + "word " * 10_600, "I have read it")


def jsonl(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@dataclass(frozen=True)
class Case:
    """One wrong input: what differs from a recipe that is right, the data, and what is printed (FOLDER is the recipe's, # a number)."""

    message: str
    content: bytes = jsonl(*CHATS)
    base: str = "builtin:tiny"
    model: str = ""
    path: str = "eggs.jsonl"
    format: str = ""
    replace: tuple[str, str] = ("", "")

    def write(self, folder: Path) -> Path:
        """The recipe and its data, in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eggs.jsonl").write_bytes(self.content)
        values = {"BASE": self.base, "MODEL": self.model, "PATH": self.path, "FORMAT": self.format}
        text = RECIPE
        for name, value in values.items():
            text = text.replace(name, value)
        (folder / "bad.yaml").write_text(text.replace(*self.replace) if self.replace[0] else text)
        return folder / "bad.yaml"

    def matches(self, words: str, folder: Path) -> bool:
        """Whether these are the words of the message, in which # is any number: lengths depend on the tokenizer."""
        return re.fullmatch(re.escape(self.message).replace(r"\#", r"\d+"), words.replace(str(folder), "FOLDER")) is not None


UNREADABLE = "error: a data file cannot be read\n\n"
NO_STOP = """error: the chat template cannot be trained with

  model.template: the chat template writes no end-of-turn token after an answer, so the model would not learn to stop
    hint: write `{{ eos_token }}` after an answer in the template, or use `model.template: plain`
"""

CASES = {
    "two misspelt words": Case(
        replace=("rank: 8}\ntrain: {steps: 2}", "rnak: 8}\ntrain: {steps: 2, schedule: {kind: cosin}}"),
        message="""error: recipe `FOLDER/bad.yaml` has 2 problems

  method.rnak (line 7, column 22): unknown key
    hint: did you mean `rank`?

  train.schedule (line 8, column 19): unknown kind `cosin`
    hint: did you mean `cosine`?
""",
    ),
    "wrong column": Case(
        format=", format: {kind: chat, messages: dialogue}",
        message="""error: 3 rows of the first 3 in `eggs` cannot be used

  eggs.jsonl:1 and 2 more rows: column `dialogue` is not there (columns: messages)
""",
    ),
    "columns of no format": Case(
        content=jsonl({"titel": "a", "body": "b"}),
        message="""error: the format is unknown

  eggs: columns (titel, body) fit no format
    hint: formats and their columns: chat (messages), completion (prompt, completion), instruction (instruction, output), text (text); \
other names go into `format`, such as `{kind: text, text: titel}`
""",
    ),
    "missing file": Case(
        path="egs.jsonl",
        message=UNREADABLE
        + """  FOLDER/egs.jsonl: there is no such file
    hint: did you mean `FOLDER/eggs.jsonl`?
""",
    ),
    "empty file": Case(content=b"", message=UNREADABLE + "  eggs.jsonl: is empty\n"),
    "only blank lines": Case(content=b"\n \n", message="error: a data file is empty\n\n  eggs.jsonl: has no rows\n"),
    "template without answers": Case(model=f', template: "{USER_ONLY}"', message=NO_STOP),
    "template without an end": Case(model=f', template: "{NO_END}"', message=NO_STOP),
    "no turn is trained": Case(
        content=jsonl(*[chat("Is it?", "It is", train=False)] * 2),
        message="""error: `eggs` cannot be used

  eggs: trains nothing: of 2 rows none is left (no target: 2)
    hint: trained is what has a weight above 0; in a chat, turns of the role `assistant` without `train: false`
""",
    ),
    "row of 53 kB": Case(
        content=jsonl(*CHATS, ROW_OF_53_KB),
        message="""error: 1 row of 4 in `eggs` is longer than `data.max_length` (1024)

  eggs: half of the rows have at most # tokens, 95 % at most #, the longest #
    hint: set `data.max_length` higher, or `data.on_overflow` to `drop`, `truncate_prompt` or `split`

  eggs.jsonl:4: # tokens, # too many
""",
    ),
    "latin-1": Case(
        content='{"text": "café au lait"}\n'.encode("latin-1"),
        message=UNREADABLE
        + """  eggs.jsonl:1: byte 0xe9 at offset 13 is not UTF-8; it looks like latin-1: '{"text": "café au lait"}'
    hint: `iconv -f latin-1 -t utf-8 eggs.jsonl > utf8-eggs.jsonl` converts it
""",
    ),
    "broken JSON": Case(
        content=jsonl(*CHATS) + b'{"messages": [}\n' + jsonl(*CHATS),
        message=UNREADABLE + "  eggs.jsonl:4: is not valid JSON: Expecting value at column 15, found '}'\n",
    ),
    "unknown builtin": Case(
        base="builtin:tny",
        message="""error: there is no such model

  builtin:tny: unknown model `tny`
    hint: did you mean `tiny`?
""",
    ),
    "no model folder": Case(base="./nowhere", message="error: the model cannot be had\n\n  `FOLDER/nowhere` is no folder\n"),
    "a hub id without a hub": Case(
        base="nobody/no-model",
        message="""error: the model cannot be had

  `nobody/no-model` is not a local folder, and the hub cannot be reached
    hint: check the connection, or give a local folder or `builtin:tiny`
""",
    ),
}

# Runs every recipe in one fresh interpreter and reports what was printed and which heavy modules were imported.
DRIVER = """
import contextlib, io, json, sys
from ftcli.cli.main import run
results = {}
for name, path in json.loads(sys.argv[1]).items():
    words = io.StringIO()
    with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
        code = run(["check", "--fast", path])
    results[name] = [code, words.getvalue()]
heavy = {"torch", "transformers", "peft", "datasets", "accelerate", "matplotlib", "bitsandbytes"} & set(sys.modules)
print(json.dumps([results, sorted(heavy)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-input")


@pytest.fixture(scope="module")
def checked(folder: Path) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """What `ftcli check --fast` says to every case, and the heavy modules it imported."""
    paths = {name: str(case.write(folder / name.replace(" ", "-"))) for name, case in CASES.items()}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src"), "FTCLI_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(paths)], env=environment, capture_output=True, text=True, check=True)
    results, heavy = json.loads(done.stdout)
    return results, heavy


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_exit_code_2_with_the_exact_message(
    name: str, folder: Path, checked: tuple[dict[str, tuple[int, str]], list[str]]
) -> None:
    code, words = checked[0][name]
    assert CASES[name].matches(words, folder / name.replace(" ", "-")), words
    assert code == 2


def test_no_bad_input_costs_an_import_of_torch(checked: tuple[dict[str, tuple[int, str]], list[str]]) -> None:
    assert checked[1] == []


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_not_trained_on_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    recipe = CASES[name].write(tmp_path)
    assert run(["train", str(recipe)]) == 2
    words = capsys.readouterr().err
    assert CASES[name].matches(words, tmp_path), words
    kept = {path for path in files(tmp_path) if not path.startswith("cache/") and path != "cache"}
    assert kept == {"bad.yaml", "eggs.jsonl"}
    assert not [path for path in files(tmp_path) if path.endswith((".npy", ".json")) or ".partial" in path]


def test_what_the_first_rows_do_not_show_is_found_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 301 has a role that there is not, and row 302 a weight that is none; `--fast` looks at the first rows only."""
    wrong = [{"messages": [{"role": "usr", "content": "a"}]}, chat("a", "b", weight=-1)]
    case = Case(
        content=jsonl(*(chat(f"How many eggs are {n} eggs?", f"{n} eggs") for n in range(300)), *wrong),
        message="""error: 2 rows of the first # in `eggs` cannot be used

  eggs.jsonl:301: messages.1 has the unknown role `usr`
    hint: did you mean `user`?

  eggs.jsonl:302: messages.2.weight is `-1`, not a number from 0 up
""",
    )
    recipe = case.write(tmp_path)
    assert run(["check", "--fast", str(recipe)]) == 0
    capsys.readouterr()
    assert run(["train", str(recipe)]) == 2
    words = capsys.readouterr().err
    assert case.matches(words, tmp_path), words
    assert not (tmp_path / "run").exists()
