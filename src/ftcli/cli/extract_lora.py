"""`ftcli extract-lora TUNED --base BASE -o OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("extract-lora")
def extract_lora(
    tuned: Annotated[str, typer.Argument(help="The tuned model: a folder, the run of a full fine-tuning, builtin:NAME, or a hub id.")],
    base: Annotated[str, typer.Option(help="The model it was tuned from: builtin:NAME, a local folder, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new adapter folder, in PEFT's layout.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Largest rank of a layer.")] = None,
    energy: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Smallest share of each layer's change to keep; 0.99 with neither.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights written: float32, bfloat16, float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the result is compared: auto, cpu, cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Make a LoRA adapter of the difference between two models, with the energy it keeps of every layer's change."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.errors import UsageError

    allowed = ("float32", "bfloat16", "float16")
    if dtype not in allowed:
        raise UsageError(f"--dtype: unknown dtype `{dtype}`", hint=", ".join(allowed))
    with words_on_stderr(as_json):
        from ftcli.exporting.extract_lora import extract
        from ftcli.reporting.live import Reporter

        with Reporter() as reporter:
            found = extract(tuned, base, output, rank=rank, energy=energy, dtype=dtype, device=device, progress=reporter)
            for line in found.lines():
                reporter.note(line)
            reporter.note(f"adapter: {output}")
    if as_json:
        print_json(found.to_json())
