"""The entry point `ftcli`: finds the command, and turns what goes wrong into words and an exit code.

A command is a module `ftcli.cli.<name>`, imported only when it is called, so that `ftcli --help` stays fast. The module has
either a function named like the command, or, where there are sub-commands, `app = typer.Typer()`. A command raises
`FtcliError` for what the user is to be told, `typer.Exit(code)` to end with another code, and knows nothing of this file.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ftcli.cli.console import print_error, print_json
from ftcli.errors import EXIT_FINE, EXIT_RUN_FAILED, FtcliError, UsageError, did_you_mean

EXIT_KEYBOARD = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

COMMANDS = {
    "train": "Train as a recipe says, and prove what was trained.",
    "check": "Do every check a run begins with, without training.",
    "merge": "Merge models by a recipe, or an adapter into its base.",
    "merge-statistics": "Gather what fisher and regmean merges need.",
    "cold": "Fine-tune in rounds with others, and average.",
    "lr-find": "Suggest a learning rate by a range test.",
    "extract-lora": "Make an adapter of the difference between two models.",
    "adapter-drop": "Leave out an adapter's first layers, or measure it.",
    "export": "Write a run or model in the form the next tool loads.",
    "eval": "Measure models on tasks, compare them, judge gates.",
    "compare-approaches": "Prompt, look up or fine-tune? Side by side.",
    "generate": "Answer prompts with a run or a model.",
    "predict": "Give the rows of a file their labels.",
    "chat": "Talk with a run or a model.",
    "serve": "Answer OpenAI-style requests with a base and adapters.",
    "report": "Write the report of a run, or of several together.",
    "diagnose": "Say what is wrong with a run, and what to try.",
    "verify": "Replay every proof of a run, a merge or an export.",
    "watch": "Show curves of a run as it goes.",
    "runs": "List, show and compare runs.",
    "init": "Write a first recipe for a model and a data file.",
    "schema": "Print the JSON schema of recipes, for editors.",
    "data": "Look at data: measure, find leaks, choose from a pool.",
    "cache": "List or clear the cache of tokenised data.",
    "doctor": "Show versions, devices, and what is missing.",
}


class LazyCommands(TyperGroup):
    """The commands of the table above; the help is made from the table alone."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name], rich_markup_mode=None) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS:
            hint = did_you_mean(name, list(COMMANDS)) or f"commands: {', '.join(COMMANDS)}"
            raise UsageError(f"unknown command `{name}`", hint=hint)
        return name, load_command(name), args[1:]


def load_command(name: str) -> Any:
    """The command `name` as typer runs it."""
    module = importlib.import_module(f"ftcli.cli.{name.replace('-', '_')}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command(name)(getattr(module, name))
    app.rich_markup_mode = None
    app._add_completion = False
    return typer.main.get_command(app)


def _print_version(asked: bool) -> None:
    if asked:
        from ftcli.reporting.machine import version_of

        print(f"ftcli {version_of('ftcli') or '(not installed)'}")
        raise typer.Exit


app = typer.Typer(cls=LazyCommands, rich_markup_mode=None, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


@app.callback()
def ftcli(version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version.")) -> None:
    """Adapt language models, and prove what was done. Start with: ftcli init, ftcli check, ftcli train."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line and exits with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: what a terminal cannot show is no error
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command line."""
    try:
        code = _run(list(arguments), as_json="--json" in arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError as error:
        if not _reader_is_gone():
            return _report_bug(error)
        # whatever is still buffered would fail again when the interpreter flushes stdout on its way out
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return EXIT_BROKEN_PIPE


def _run(arguments: list[str], as_json: bool) -> int:
    try:
        _invoke(arguments)
        return EXIT_FINE
    except typer.Exit as exit_request:
        return exit_request.exit_code
    except FtcliError as error:
        return _report(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_KEYBOARD
    except BrokenPipeError:
        raise
    except Exception as error:
        return _end_of_usage(error, as_json) or _report_bug(error)


def _invoke(arguments: list[str]) -> None:
    """Runs the command; not with typer's `main`, which hides broken pipes between processes and words errors its own way."""
    # it says at import which of its kernels it has not got, whether or not anything is to be quantised
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    command = typer.main.get_command(app)
    if "_FTCLI_COMPLETE" in os.environ:  # a shell asks for completions
        command.main(arguments, prog_name="ftcli")
    with command.make_context("ftcli", arguments) as context:
        command.invoke(context)


def _reader_is_gone() -> bool:
    """True when whoever read our stdout has gone away, which is no error (`ftcli runs | head`)."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _report(error: FtcliError, as_json: bool) -> int:
    print_error(str(error))
    if as_json:
        problems = [{"where": problem.where, "what": problem.what, "hint": problem.hint} for problem in error.problems]
        kind = type(error).__name__
        print_json(
            {"error": {"kind": kind, "exit_code": error.exit_code, "summary": error.summary, "hint": error.hint, "problems": problems}}
        )
    return error.exit_code


def _report_bug(error: Exception) -> int:
    import traceback

    traceback.print_exception(error)
    print_error(f"this is a bug of ftcli, not of your request ({type(error).__name__}); please report it with the lines above")
    return EXIT_RUN_FAILED


def _end_of_usage(error: Exception, as_json: bool) -> int:
    """The exit code if `error` is typer's complaint about the command line, printed in ftcli's words, else 0."""
    # told by what they have and are called: typer keeps these classes to itself
    if not hasattr(error, "format_message"):
        return 0
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error, file=sys.stderr)
        return UsageError.exit_code
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    hint = f"see `{context.command_path if context is not None else 'ftcli'} --help`"
    if type(error).__name__ == "NoSuchOption" and context is not None and option is not None:
        known = [name for parameter in context.command.get_params(context) for name in parameter.opts]
        hint = did_you_mean(option, known) or (_key_hint(option) if "--set" in known else None) or hint
        return _report(UsageError(f"unknown option `{option}` of `{context.command_path}`", hint=hint), as_json)
    message, _, meant = (
        re.sub(r"'([^']*)'", r"`\1`", error.format_message().replace(": Value error, ", ": "))
        .strip()
        .removesuffix(".")
        .partition(". Did you mean ")
    )
    return _report(UsageError(message[:1].lower() + message[1:], hint=f"did you mean {meant}" if meant else hint), as_json)


def _key_hint(option: str) -> str | None:
    """The hint for an option that is a key of the recipe: no flag but `--set` changes what is trained."""
    from ftcli.recipe.explain import FOREIGN_KEYS
    from ftcli.recipe.schema import homes

    word = option.lstrip("-").replace("-", "_")
    places = {".".join([*map(str, parents), word]) for parents, _ in homes().get(word, ()) if "N" not in parents}
    # Of several places the method's is meant: it is the one that other tools have a flag for.
    chosen = [place for place in places if len(places) == 1 or place.startswith("method.")]
    key = FOREIGN_KEYS.get(word) or (chosen[0] if chosen else None)
    return None if key is None else f"a key of the recipe is changed by `--set {key}=...`"


if __name__ == "__main__":
    main()
