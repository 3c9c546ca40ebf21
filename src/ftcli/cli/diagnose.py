"""`ftcli diagnose RUN...`: what is wrong with a run, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[list[str], typer.Argument(help="Run folders, or names of runs in the runs folder.", show_default=False)]
Folder = Annotated[Path, typer.Option("--folder", "-f", help="Where the runs are.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def diagnose(runs: Runs, folder: Folder = Path("runs"), as_json: AsJson = False) -> None:
    """Say what is wrong with runs, from their curves and numbers: the evidence, and what to try next.

    Looks for a dead adapter, leaked rows, a template that is not the base's, prompts that are learnt, rows that were cut, a
    learning rate too high or too low, overfitting, forgetting, too few steps, underfitting. Trains and loads nothing.
    """
    from ftcli.cli.console import print_json
    from ftcli.reporting.diagnosis.diagnose import diagnose as look
    from ftcli.reporting.found_run import find_run, read_run

    found = [(run, look(run)) for run in (read_run(find_run(name, folder)) for name in runs)]
    if as_json:
        print_json([{"run": run.name, "path": str(run.path), **diagnosis.to_json()} for run, diagnosis in found])
        return
    for place, (run, diagnosis) in enumerate(found):
        if len(found) > 1:
            print(f"{'' if place == 0 else chr(10)}{run.path}")
        for line in diagnosis.lines():
            print(line)
