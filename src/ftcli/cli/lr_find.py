"""`ftcli lr-find RECIPE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PICTURES = (".svg", ".png")


app = typer.Typer()


@app.command("lr-find")
def lr_find(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key: method.rank=8.")] = None,
    lowest: Annotated[float | None, typer.Option("--from", help="First rate; a thousandth of the default.", show_default=False)] = None,
    highest: Annotated[float | None, typer.Option("--to", help="Last rate; 1000 times the default.", show_default=False)] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps to take; more of them tell rates apart.")] = 100,
    plot: Annotated[Path | None, typer.Option("--plot", help="Picture, .svg or .png; lr-find-NAME.svg.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the curve as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Suggest a learning rate: train a few steps at rising ones, in memory alone."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.errors import UsageError
    from ftcli.recipe.chain import is_chain
    from ftcli.recipe.load import load_recipe

    if is_chain(recipe):
        raise UsageError("lr-find is for one run, not for a recipe with stages", hint="put a stage's keys into a recipe of its own")
    if steps < 20:
        raise UsageError(f"--steps: found {steps}, allowed: 20 and more")
    if lowest is not None and lowest <= 0:
        raise UsageError(f"--from: found {lowest:g}, allowed: above 0")
    if lowest is not None and highest is not None and highest <= lowest:
        raise UsageError(f"--to: found {highest:g}, allowed: above `--from` ({lowest:g})")
    loaded = load_recipe(recipe, overrides or ())
    picture = plot if plot is not None else Path(f"lr-find-{loaded.recipe.name}.svg")
    if picture.suffix.lower() not in PICTURES:
        raise UsageError(f"--plot: found `{picture.name}`, allowed: {', '.join(PICTURES)}")
    with words_on_stderr(as_json):
        from ftcli.reporting.live import Reporter
        from ftcli.reporting.rate_plot import plot_rates, rate_table
        from ftcli.training.lr_find import find_lr

        with Reporter() as reporter:
            curve = find_lr(loaded.recipe, reporter, lowest=lowest, highest=highest, num_steps=steps)
        plot_rates(curve, picture)
        if not as_json:
            print("\n".join(rate_table(curve)))
            if curve.suggestion is None:
                print(f"\nno suggestion: the loss falls at none of these rates; the default is {curve.default_lr:.1e}")
            else:
                print(f"\nsuggested: train.lr: {curve.suggestion:.1e} (the default is {curve.default_lr:.1e})")
            print(f"the curve: {picture}")
    if as_json:
        print_json({"recipe": str(loaded.path), "plot": str(picture), **curve.to_json()})
