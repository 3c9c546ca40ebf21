"""What the user reads when a command line is wrong, and how fast the help is there."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import typer

from ftcli.cli import main
from ftcli.cli.console import print_json
from ftcli.errors import GateError, InterruptedRun, Problem, RecipeError

HEAVY = {"torch", "transformers", "peft", "datasets", "pyarrow", "pydantic", "rich", "yaml", "numpy"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Puts a function in the place of `ftcli doctor`."""

    def _command(function: Callable[..., None]) -> None:
        module = types.ModuleType("ftcli.cli.doctor")
        module.doctor = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ftcli.cli.doctor", module)

    return _command


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = "import sys; from ftcli.cli.main import run; run(['--help']); print(*{name.partition('.')[0] for name in sys.modules})"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())
    # processor time, which a busy machine does not stretch
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 0.3


def test_help_lists_every_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    width = max(map(len, main.COMMANDS))
    for name, help_line in main.COMMANDS.items():
        assert f"{name:<{width}}  {help_line}" in lines


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_every_command_has_a_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([name, "--help"]) == 0
    assert f"Usage: ftcli {name}" in capsys.readouterr().out


def test_no_command_shows_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Commands:" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "error: unknown command `tran`\n  hint: did you mean `train`?\n"),
        (["xyz"], "error: unknown command `xyz`\n  hint: commands: train, check, merge, "),
        (["--versoin"], "error: unknown option `--versoin` of `ftcli`\n  hint: did you mean `--version`?\n"),
        (["schema", "--ouput", "x"], "error: unknown option `--ouput` of `ftcli schema`\n  hint: did you mean `--output`?\n"),
        (
            ["train", "x.yaml", "--learning-rate", "1"],
            "error: unknown option `--learning-rate` of `ftcli train`\n  hint: a key of the recipe is changed by `--set train.lr=...`\n",
        ),
        (
            ["train", "x.yaml", "--rank", "8"],
            "error: unknown option `--rank` of `ftcli train`\n  hint: a key of the recipe is changed by `--set method.rank=...`\n",
        ),
        (["schema", "--output"], "error: option `--output` requires an argument\n"),
        (["init", "--data", "x"], "error: missing option `--model`\n  hint: see `ftcli init --help`\n"),
        (["cache", "cler"], "error: no such command `cler`\n  hint: did you mean `clear`?\n"),
        (["doctor", "x"], "error: got unexpected extra argument(s) (x)\n  hint: see `ftcli doctor --help`\n"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2_with_a_hint(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.out == ""


@pytest.mark.parametrize(("error", "code"), [(RecipeError("x"), 2), (GateError("x"), 3), (InterruptedRun("x"), 75)])
def test_an_error_of_ftcli_ends_with_its_code_and_without_a_traceback(
    command: Callable[..., None], error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def doctor() -> None:
        raise error

    command(doctor)
    assert main.run(["doctor"]) == code
    assert capsys.readouterr().err == "error: x\n"


def test_with_json_an_error_is_one_object_on_stdout_too(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def doctor(as_json: bool = typer.Option(False, "--json")) -> None:
        raise RecipeError("recipe `x` has 1 problem", [Problem("train.lr (line 4, column 3)", "unknown key", "did you mean `x`?")])

    command(doctor)
    assert main.run(["doctor", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "error": {
            "kind": "RecipeError",
            "exit_code": 2,
            "summary": "recipe `x` has 1 problem",
            "hint": None,
            "problems": [{"where": "train.lr (line 4, column 3)", "what": "unknown key", "hint": "did you mean `x`?"}],
        }
    }
    assert captured.err.startswith("error: recipe `x` has 1 problem\n")


def test_anything_else_is_a_bug_with_its_traceback(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def doctor() -> None:
        error = ZeroDivisionError("division by zero")
        error.add_note("run folder: runs/x")
        raise error

    command(doctor)
    assert main.run(["doctor"]) == 1
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert "run folder: runs/x" in text
    assert "error: this is a bug of ftcli, not of your request (ZeroDivisionError)" in text


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (typer.Abort(), 130), (typer.Exit(3), 3)])
def test_an_interruption_is_quiet(
    command: Callable[..., None], error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def doctor() -> None:
        raise error

    command(doctor)
    assert main.run(["doctor"]) == code
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argument", ["schema", "--version"])
def test_a_reader_that_goes_away_is_no_error(argument: str) -> None:
    code = f"from ftcli.cli.main import main; main([{argument!r}])"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == main.EXIT_BROKEN_PIPE


def test_a_pipe_that_breaks_between_processes_is_no_reader_that_went_away(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def doctor() -> None:
        raise BrokenPipeError(32, "a worker is dead")

    command(doctor)
    assert main.run(["doctor"]) == 1
    assert "this is a bug of ftcli" in capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ftcli ")


def test_numbers_that_json_has_not_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "all": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "all": [None, 1.5]}


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "ftcli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ftcli ")


def test_what_a_terminal_cannot_show_is_no_error() -> None:
    code = "import sys; import ftcli.cli.main as m; m.run = lambda a: print('\\u00e9 \\udcff'); m.main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True)
    assert done.stdout == b"\\xe9 \\udcff\n"
