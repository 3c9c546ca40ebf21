"""`ftcli predict TARGET --data FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    target: Annotated[str, typer.Argument(help="A classifier's run, checkpoint or model folder.")],
    data: Annotated[Path, typer.Option("--data", help="Rows with the text: JSONL, CSV, Parquet, ...; labels need not be there.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSONL here instead of stdout.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, mps; auto takes an accelerator where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Give each row of a file its label, with the probability."""
    import sys

    from ftcli.cli.console import print_json
    from ftcli.exporting.predict import predict_file
    from ftcli.files import json_text, said_when_disk_is_full, write_text
    from ftcli.reporting.live import Reporter

    with Reporter(stream=sys.stderr) as reporter:
        predictions = predict_file(target, data, device=device, progress=reporter)
    rows = [prediction.to_json() for prediction in predictions]
    if output is not None:
        with said_when_disk_is_full(output):
            write_text(output, "".join(json_text(row) + "\n" for row in rows))
    if as_json:
        print_json({"target": target, "predictions": rows})
    elif output is None:
        for row in rows:
            typer.echo(json_text(row))
    else:
        typer.echo(f"{len(rows)} predictions -> {output}")
