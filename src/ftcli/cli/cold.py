"""`ftcli cold`: rounds of fine-tuning and averaging, with a folder as the meeting place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Rounds of fine-tuning and averaging, with a folder as the meeting place.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The meeting place.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout; words go to stderr.")]


@app.command()
def init(
    folder: Folder,
    base: Annotated[str, typer.Option(help="Where round 0 starts: builtin:NAME, a local folder, or a hub id.")],
    as_json: AsJson = False,
) -> None:
    """Make a meeting place whose round 0 starts from a base model."""
    from ftcli.cli.console import print_json
    from ftcli.merging.cold import begin, status

    report = status(begin(folder, base))
    if as_json:
        print_json(report)
    else:
        typer.echo(f"{folder}: round 0 starts from {base}\nnext: ftcli cold contribute {folder} --recipe RECIPE.yaml", err=True)


@app.command()
def contribute(
    folder: Folder,
    recipe: Annotated[Path | None, typer.Option(help="A training recipe; its base becomes the current round's model.")] = None,
    model: Annotated[Path | None, typer.Option(help="Instead of a recipe: a model folder made from the round's model elsewhere.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the contribution; the default is the recipe's, or the model folder's.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where the training run is kept; the default is runs/ in the current folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train from the current round's model and put the result into the round; the same command goes on after a kill."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.errors import UsageError
    from ftcli.merging.cold import put
    from ftcli.merging.meeting import Meeting

    if (recipe is None) == (model is None):
        raise UsageError(
            "found both or none of --recipe and --model, allowed: one", hint="ftcli cold contribute FOLDER --recipe RECIPE.yaml"
        )
    meeting = Meeting(folder)
    now = meeting.current
    with words_on_stderr(as_json):
        if recipe is None:
            assert model is not None
            report = put(meeting, now, name or model.resolve().name, model, {})
        else:
            from ftcli.merging.cold import contribute as train_and_put
            from ftcli.reporting.live import Reporter

            with Reporter() as reporter:
                report = train_and_put(meeting, recipe, reporter, name=name, overrides=overrides or (), work=work)
    if as_json:
        print_json(report)
    else:
        typer.echo(f"contributed to round {now.number}: {report['folder']}\nnext: ftcli cold fuse {folder}", err=True)


@app.command()
def fuse(
    folder: Folder,
    expect: Annotated[int | None, typer.Option(min=1, help="Fuse only if so many contributions are there; else exit with 3.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove the weights of the contributions afterwards.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Tensors merged at once; one for each processor.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Load the result and run it once.")] = True,
    as_json: AsJson = False,
) -> None:
    """Average the round's contributions into the model that the next round starts from."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.merging.cold import fuse as average
    from ftcli.merging.meeting import Meeting

    with words_on_stderr(as_json):
        from ftcli.reporting.live import Reporter

        with Reporter() as reporter:
            report = average(Meeting(folder), expect=expect, prune=prune, threads=threads, verify=verify, say=reporter.update)
            reporter.note(f"round {report['round']} starts from the mean of {', '.join(report['contributions'])}: {report['model']}")
    if as_json:
        print_json(report)


@app.command()
def remove(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Of the contribution.")],
    as_json: AsJson = False,
) -> None:
    """Take a contribution out of the current round."""
    from ftcli.cli.console import print_json
    from ftcli.merging.cold import remove as take_out
    from ftcli.merging.meeting import Meeting

    taken = take_out(Meeting(folder), name)
    if as_json:
        print_json({"removed": str(taken)})
    else:
        typer.echo(f"removed: {taken}", err=True)


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show the rounds and who has contributed."""
    from ftcli.cli.console import print_json
    from ftcli.merging.cold import status as status_of
    from ftcli.merging.cold import status_lines
    from ftcli.merging.meeting import Meeting

    report = status_of(Meeting(folder))
    if as_json:
        print_json(report)
    else:
        print("\n".join(status_lines(report)))
