"""`ftcli train RECIPE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key: train.lr=1e-4.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder; with none there, begin it.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="The whole recipe end to end on a few rows, in a folder of its own.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Train as a recipe says, and prove what was trained."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with words_on_stderr(as_json):
        from ftcli.reporting.live import Reporter

        with Reporter() as reporter:
            if smoke:
                from ftcli.training.smoke import smoke_run

                summary = smoke_run(loaded, reporter)
            else:
                from ftcli.training.run import run_recipe

                summary = run_recipe(loaded, reporter, resume=resume)
    if as_json:
        print_json(summary)
