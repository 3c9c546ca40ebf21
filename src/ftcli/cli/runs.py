"""`ftcli runs`: list, show and compare runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftcli.reporting.found_run import FoundRun

app = typer.Typer(help="List, show and compare runs.", invoke_without_command=True)

Folder = Annotated[Path, typer.Option("--folder", "-f", help="Where the runs are.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
RUNS = Path("runs")


@app.callback()
def runs(context: typer.Context, folder: Folder = RUNS, as_json: AsJson = False) -> None:
    """List, show and compare runs; without a command, list those in `runs`."""
    if context.invoked_subcommand is None:
        ls(folder, as_json)


@app.command()
def ls(folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = RUNS, as_json: AsJson = False) -> None:
    """List the runs in a folder: status, method, steps, losses."""
    import time

    from ftcli.cli.console import print_json
    from ftcli.errors import UsageError
    from ftcli.reporting.found_run import read_run, runs_in
    from ftcli.reporting.overview import list_lines, summary_of

    if not folder.is_dir() and folder != RUNS:
        raise UsageError(f"the folder `{folder}` does not exist")
    found = [read_run(path) for path in runs_in(folder)]
    if as_json:
        print_json([summary_of(run) for run in found])
    elif found:
        _say(list_lines(found, folder, time.time()))
    else:
        typer.echo(f"no runs in `{folder}`", err=True)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="A run folder, or the name of one in the runs folder.")],
    folder: Folder = RUNS,
    as_json: AsJson = False,
) -> None:
    """Show one run: losses, evaluation, data, proofs, files."""
    import time

    from ftcli.cli.console import print_json
    from ftcli.reporting.overview import BLOCKS, PLAIN_BLOCKS, details_of, show_lines

    found = _find([run], folder)[0]
    if as_json:
        print_json(details_of(found))
    else:
        _say(show_lines(found, time.time(), BLOCKS if _writes(BLOCKS) else PLAIN_BLOCKS))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more runs; the others are compared with the first.")],
    folder: Folder = RUNS,
    as_json: AsJson = False,
) -> None:
    """Compare runs: how their recipes differ, and their last metrics side by side."""
    from ftcli.cli.console import print_json
    from ftcli.errors import UsageError
    from ftcli.reporting.overview import compare_lines, comparison_of

    if len(runs) < 2:
        raise UsageError("one run alone cannot be compared", hint="name two or more")
    found = _find(runs, folder)
    if as_json:
        print_json(comparison_of(found))
    else:
        _say(compare_lines(found))


def _find(names: list[str], folder: Path) -> list[FoundRun]:
    from ftcli.reporting.found_run import find_run, read_run

    return [read_run(find_run(name, folder)) for name in names]


def _say(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def _writes(text: str) -> bool:
    """Whether stdout has these characters."""
    import sys

    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
