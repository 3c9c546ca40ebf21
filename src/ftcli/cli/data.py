"""`ftcli data`: look at data before it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftcli.data.leakage import Hit, Leakage

app = typer.Typer(help="Look at data before it is trained on.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
RecipeFile = Annotated[Path | None, typer.Argument(help="A recipe: all of its training and evaluation sources.", show_default=False)]
Train = Annotated[list[Path] | None, typer.Option("--train", help="A file to train on, instead of a recipe.", show_default=False)]
Evaluation = Annotated[list[Path] | None, typer.Option("--evaluation", help="A file to evaluate on.", show_default=False)]
MinNear = Annotated[float, typer.Option("--min-near", min=0.3, max=1, help="Common character 4-grams from which rows are near.")]
Ngram = Annotated[int, typer.Option("--ngram", min=8, max=13, help="Words in an n-gram; shorter rows are looked for whole.")]
Show = Annotated[int, typer.Option("--show", min=0, help="Hits of each kind to print.")]
Fail = Annotated[bool, typer.Option("--fail", help="Exit 3 if an evaluation row stands in the training data.")]


@app.callback()
def data() -> None:
    """Look at data before it is trained on."""


@app.command()
def audit(
    recipe: RecipeFile = None,
    train: Train = None,
    evaluation: Evaluation = None,
    min_near: MinNear = 0.6,
    ngram: Ngram = 13,
    show: Show = 5,
    fail: Fail = False,
    as_json: AsJson = False,
) -> None:
    """Find rows that repeat, contradict each other, or stand in training and evaluation data both."""
    from ftcli.cli.console import print_json
    from ftcli.data.leakage import find_leakage, read_text
    from ftcli.errors import GateError, UsageError

    if (recipe is None) == (not train):
        raise UsageError(
            "`ftcli data audit` needs a recipe, or --train FILE", hint="ftcli data audit --train train.jsonl --evaluation test.jsonl"
        )
    sides = _sources_of_recipe(recipe) if recipe is not None else _files(train or [], evaluation or [])
    learnt, held_out = ([read_text(row, where) for source in side for where, row in source.rows()] for side in sides)  # type: ignore[attr-defined]
    found = find_leakage(learnt, held_out, min_near=min_near, ngram=ngram)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found, show)
    if fail and found.leaked:
        raise GateError(f"{len(found.leaked)} of {found.num_evaluation} evaluation rows stand in the training data")


def _sources_of_recipe(path: Path) -> tuple[list[object], list[object]]:
    from ftcli.recipe.load import load_recipe

    data = load_recipe(path).recipe.data
    return [entry.source for entry in data.train], [entry.source for entry in data.evaluation]


def _files(train: Sequence[Path], evaluation: Sequence[Path]) -> tuple[list[object], list[object]]:
    from ftcli.data.sources.file import File

    def sources(paths: Sequence[Path]) -> list[object]:
        return [File(kind="file", path=str(path)) for path in paths]

    return sources(train), sources(evaluation)


def _print(found: Leakage, show: int) -> None:
    print(f"{found.num_train} training rows, {found.num_evaluation} evaluation rows")
    parts = [
        ("evaluation rows that stand in the training data", found.leaked),
        ("training rows that repeat an earlier one", found.repeated),
        ("evaluation rows that repeat an earlier one", found.repeated_evaluation),
        ("rows that answer the question of an earlier one otherwise", found.conflicts),
    ]
    for what, hits in parts:
        counts = ", ".join(f"{count} {kind}" for kind, count in found.counts(hits).items())
        print(f"\n{len(hits)} {what}{f': {counts}' if counts else ''}")
        for hit in _first_of_each(hits, show):
            print(f"  {hit.where}  {hit.kind} {hit.share:.0%} of  {hit.other}")


def _first_of_each(hits: Sequence[Hit], show: int) -> list[Hit]:
    """The first `show` hits of every kind."""
    shown: dict[str, list[Hit]] = {}
    for hit in hits:
        shown.setdefault(hit.kind, []).append(hit)
    return [hit for group in shown.values() for hit in group[:show]]
