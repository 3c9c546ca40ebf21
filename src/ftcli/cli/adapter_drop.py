"""`ftcli adapter-drop RUN --layers K -o OUT`, or `ftcli adapter-drop RUN --report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("adapter-drop")
def adapter_drop(
    run: Annotated[str, typer.Argument(help="The run folder of an adapter (kind: adapter or adamix).")],
    layers: Annotated[int | None, typer.Option(min=0, help="Drop the adapters of so many first layers.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The new adapter folder, in PEFT's layout.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Measure loss and speed for every number of layers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Leave out the adapters of the first layers, or measure what that costs and gains."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.errors import UsageError
    from ftcli.reporting.found_run import find_run

    if layers is None and not report:
        raise UsageError("neither --layers nor --report is given", hint="ftcli adapter-drop RUN --report")
    if layers is not None and report:
        raise UsageError("either --layers or --report", hint="first the report, then the number of layers that it speaks for")
    if layers is not None and output is None:
        raise UsageError("--layers needs --output", hint=f"ftcli adapter-drop {run} --layers {layers} -o OUT")
    folder = find_run(run, Path("runs"))
    with words_on_stderr(as_json):
        from ftcli.exporting.adapter_drop import PLOT, REPORT, measure_drops, write_dropped
        from ftcli.reporting.live import Reporter

        with Reporter() as reporter:
            if layers is not None and output is not None:
                kept = write_dropped(folder, layers, output)
                reporter.note(f"adapter folder: {output} ({kept} layers keep their adapters)")
                found = {"output": str(output), "layers_dropped": layers, "layers_kept": kept}
            else:
                measured = measure_drops(folder, reporter)
                for line in [*measured.lines(), f"written: {folder / REPORT}, {folder / PLOT}"]:
                    reporter.note(line)
                found = measured.to_json()
    if as_json:
        print_json(found)
