"""`ftcli watch`: look at a running or finished run from another terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[str, typer.Argument(help="A run folder, or the name of a run in `runs`.", show_default=False)]
Every = Annotated[float, typer.Option("--every", min=0.2, help="Seconds between looks.")]
Once = Annotated[bool, typer.Option("--once", help="Print what there is, and end.")]


def watch(run: Run, every: Every = 2.0, once: Once = False) -> None:
    """Show curves of a run as it goes; ends with the run. Off a terminal it prints once."""
    import shutil
    import sys
    import time

    from ftcli.reporting.found_run import find_run, read_run
    from ftcli.reporting.watch import BLOCKS, PLAIN_BLOCKS, watch_lines

    path = find_run(run, Path("runs"))
    blocks = BLOCKS if (sys.stdout.encoding or "").lower().startswith("utf") else PLAIN_BLOCKS

    def view() -> tuple[str, str]:
        size = shutil.get_terminal_size((100, 40))
        found = read_run(path)
        return found.state, "\n".join(watch_lines(found, time.time(), size.columns, size.lines - 1, blocks))

    if once or not sys.stdout.isatty():
        print(view()[1])
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(Text(""), console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            state, text = view()
            live.update(Text(text), refresh=True)
            if state != "running":
                break
            time.sleep(every)
    print(text)
