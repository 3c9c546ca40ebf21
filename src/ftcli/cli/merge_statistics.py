"""`ftcli merge-statistics MODEL --data FILE --kind fisher -o stats.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("merge-statistics")
def merge_statistics(
    model: Annotated[str, typer.Argument(help="As a merge recipe names it: a folder, a run, builtin:NAME, a hub id, MODEL+ADAPTER.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new safetensors file, for `statistics:` in a merge recipe.")],
    kind: Annotated[str, typer.Option(help="fisher, or regmean.")],
    data: Annotated[Path | None, typer.Option(help="A file of rows like those the model was trained on.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Instead of --data: the recipe the model was trained with.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Draw so many examples; as many for each model of a merge.")] = 256,
    max_length: Annotated[int, typer.Option(min=2, help="Of --data: longest example in tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Gather on data what the merge methods fisher and regmean need to know of a model."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.errors import UsageError, did_you_mean
    from ftcli.merging.statistics import KINDS, gather_statistics

    chosen = next((known for known in KINDS if known == kind), None)
    if chosen is None:
        raise UsageError(f"--kind: unknown kind `{kind}`", hint=did_you_mean(kind, KINDS) or f"kinds: {', '.join(KINDS)}")
    if (data is None) == (recipe is None):
        raise UsageError("give either --data or --recipe", hint="ftcli merge-statistics MODEL --data rows.jsonl --kind fisher -o FILE")
    with words_on_stderr(as_json):
        from ftcli.reporting.live import Reporter

        with Reporter() as reporter:
            found = gather_statistics(
                model, output, chosen,
                data=data, recipe=recipe, num_examples=examples, max_length=max_length, seed=seed, device=device, say=reporter.update,
            )  # fmt: skip
            reporter.note(f"{kind} of {found.num_tensors} tensors from {found.num_examples} examples, {found.num_tokens} tokens")
            reporter.note(f"statistics: {output}")
    if as_json:
        print_json(found.to_json())
