"""`ftcli verify RUN|MODEL`: replay the proofs of a run, a merge or an export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a merged model, or an export.", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="Where to compute: auto, cpu, cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def verify(target: Target, device: Device = "auto", as_json: AsJson = False) -> None:
    """Replay every proof in a manifest against what is there now; exit 1 if one does not hold.

    Hashes of all files, the data and the order it was seen in, the base, a reload of the weights, merge equality, the chat
    template, greedy answers, losses of the probe's rows. What cannot be replayed is said, and counts as no proof.
    """
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.reporting.found_run import is_run
    from ftcli.reporting.verify.folder import verify as replay_all

    path = Path(target).expanduser()
    if not path.exists() and is_run(Path("runs") / target):
        path = Path("runs") / target
    with words_on_stderr(as_json):
        replays = replay_all(path, device)
    counts = {outcome: sum(replay.outcome == outcome for replay in replays) for outcome in ("holds", "fails", "not replayed")}
    is_verified = counts["fails"] == 0 and counts["holds"] > 0
    if as_json:
        print_json({"target": str(path), "verified": is_verified, "counts": counts, "proofs": [replay.to_json() for replay in replays]})
    else:
        for replay in replays:
            print(replay.line())
        told = f"{counts['holds']} hold, {counts['fails']} fail, {counts['not replayed']} could not be replayed"
        print(f"\n{path}: {'verified' if is_verified else 'NOT verified'}: {told}")
    if not is_verified:
        raise typer.Exit(1)
