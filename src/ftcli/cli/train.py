"""`ftcli train RECIPE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key: train.lr=1e-4.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder; with none there, begin it.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="The whole recipe end to end on a few rows, in a folder of its own.")] = False,
    after: Annotated[Path | None, typer.Option(metavar="RUN", help="Begin where this run ended, and replay a sample of its data.")] = None,
    replay_rows: Annotated[int, typer.Option(min=0, help="With --after: rows of earlier data to replay.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Train as a recipe says, and prove what was trained."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.errors import UsageError
    from ftcli.recipe.chain import is_chain

    if after is not None and (smoke or is_chain(recipe)):
        raise UsageError(f"--after is not for {'--smoke' if smoke else 'a recipe with stages'}")
    if is_chain(recipe):
        _train_chain(recipe, overrides or (), resume=resume, smoke=smoke, as_json=as_json)
        return
    from ftcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or (), follows=after is not None and replay_rows > 0)
    with words_on_stderr(as_json):
        from ftcli.reporting.live import Reporter

        with Reporter() as reporter:
            if smoke:
                from ftcli.training.smoke import smoke_run

                summary = smoke_run(loaded, reporter)
            elif after is not None:
                from ftcli.training.after import run_after

                summary = run_after(loaded, after, reporter, replay_rows=replay_rows, resume=resume)
            else:
                from ftcli.training.run import run_recipe

                summary = run_recipe(loaded, reporter, resume=resume)
    if as_json:
        print_json(summary)


def _train_chain(recipe: Path, overrides: Sequence[str], *, resume: bool, smoke: bool, as_json: bool) -> None:
    """The stages of a recipe, one after the other."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.recipe.chain import load_chain

    loaded = load_chain(recipe, overrides)
    with words_on_stderr(as_json):
        from ftcli.reporting.live import Reporter
        from ftcli.training.chain import run_chain
        from ftcli.training.smoke_chain import smoke_chain

        with Reporter() as reporter:
            summary = smoke_chain(recipe, overrides, reporter) if smoke else run_chain(loaded, reporter, resume=resume)
    if as_json:
        print_json(summary)
