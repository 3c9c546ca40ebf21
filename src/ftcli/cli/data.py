"""`ftcli data`: look at data before it is trained on, and choose it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftcli.data.leakage import Hit, Leakage
    from ftcli.data.select.pool import Pool
    from ftcli.data.stats.measure import DataStats

Choice = TypeVar("Choice", bound=str)

app = typer.Typer(help="Look at data before it is trained on, and choose it.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
RecipeFile = Annotated[Path | None, typer.Argument(help="A recipe: all of its training and evaluation sources.", show_default=False)]
Train = Annotated[list[Path] | None, typer.Option("--train", help="A file to train on, instead of a recipe.", show_default=False)]
Evaluation = Annotated[list[Path] | None, typer.Option("--evaluation", help="A file to evaluate on.", show_default=False)]
MinNear = Annotated[float, typer.Option("--min-near", min=0.3, max=1, help="Common character 4-grams from which rows are near.")]
Ngram = Annotated[int, typer.Option("--ngram", min=8, max=13, help="Words in an n-gram; shorter rows are looked for whole.")]
Show = Annotated[int, typer.Option("--show", min=0, help="Hits of each kind to print.")]
Fail = Annotated[bool, typer.Option("--fail", help="Exit 3 if an evaluation row stands in the training data.")]


Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, globs, folders, or builtin:NAME.", show_default=False)]
Like = Annotated[list[str], typer.Option("--like", help="The task set: rows to be like. May be given again.", show_default=False)]
Count = Annotated[int, typer.Option("--count", "-n", min=1, help="Rows to choose.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="A new folder for rows, scores and report.", show_default=False)]
By = Annotated[str, typer.Option("--by", help="perplexity, ngrams, embeddings; random is the floor.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Encoder of embeddings; domain model of perplexity.", show_default=False)]
General = Annotated[str | None, typer.Option("--general-model", help="The other model of perplexity.", show_default=False)]
NumNeighbours = Annotated[int, typer.Option("--neighbours", min=1, help="Nearest task rows that score a row (embeddings).")]
Clusters = Annotated[
    int | None, typer.Option("--clusters", min=1, help="Of the task set (embeddings); 1 for none. Default: root of its rows.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=8, help="Of a text that a model reads.")]
HeldOut = Annotated[
    list[str] | None, typer.Option("--evaluation", help="Evaluation rows: rows that hold one are left out.", show_default=False)
]
Column = Annotated[
    str | None, typer.Option("--column", help="Where the text stands; else `text`, `content`, or every text.", show_default=False)
]
Split = Annotated[str, typer.Option("--split", help="What a row of a txt file is: file, paragraph or line.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of every draw.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, mps; auto takes an accelerator where there is one.")]

TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", help="Count tokens with it: builtin:NAME, folder, hub id.", show_default=False)
]
Languages = Annotated[bool, typer.Option("--languages", help="Tell languages, not only scripts (extra `langid`).")]
KeepsApart = Annotated[
    float,
    typer.Option("--min-near", min=0.3, max=1, help="Common character 4-grams from which only the better of two rows is chosen; 1: both."),
]
Near = Annotated[bool, typer.Option("--near/--no-near", help="Look for nearly equal rows.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the lengths: FILE.svg or FILE.png.", show_default=False)]
Overlap = Annotated[list[str] | None, typer.Option("--evaluation", help="Look for the rows of this file.", show_default=False)]


@app.callback()
def data() -> None:
    """Look at data before it is trained on, and choose it."""


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


@app.command()
def select(
    pool: Files,
    like: Like,
    count: Count,
    output: Output,
    by: By = "perplexity",
    model: ModelName = None,
    general_model: General = None,
    neighbours: NumNeighbours = 10,
    clusters: Clusters = None,
    max_tokens: MaxTokens = 256,
    min_near: KeepsApart = 0.8,
    evaluation: HeldOut = None,
    column: Column = None,
    split: Split = "file",
    seed: Seed = 17,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Choose from a large pool the rows that are most like a small task set."""
    import sys

    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.data.select.run import WAYS, Selection, select
    from ftcli.reporting.live import Reporter

    selection = Selection(
        pool=_pool(pool, column, split),
        gold=_pool(like, None, split),
        count=count,
        by=_one_of("--by", by, WAYS),
        seed=seed,
        model=model,
        general_model=general_model,
        neighbours=neighbours,
        clusters=clusters,
        max_tokens=max_tokens,
        device=device,
        min_near=min_near,
        evaluation=_pool(evaluation, None, split) if evaluation else None,
    )
    with words_on_stderr(as_json), Reporter(stream=sys.stderr) as reporter:
        # without a terminal nobody sees how far it is, and rows need not be counted beforehand
        report = select(selection, output, reporter if sys.stderr.isatty() else None)
    if as_json:
        print_json({"folder": str(output), **report.to_json()})
    else:
        print("\n".join([*report.lines(), "", f"rows -> {output / ('rows' + selection.pool.output_suffix)}"]))


@app.command()
def stats(
    files: Files,
    tokenizer: TokenizerName = None,
    evaluation: Overlap = None,
    languages: Languages = False,
    near: Near = True,
    plot: Plot = None,
    column: Column = None,
    split: Split = "file",
    as_json: AsJson = False,
) -> None:
    """Measure lengths, repeats, languages, tokens per byte, and overlap with evaluation rows."""
    import sys

    from ftcli.cli.console import print_json
    from ftcli.data.stats.measure import measure
    from ftcli.models.tokenizer import load_tokenizer
    from ftcli.reporting.live import Reporter

    kind = _picture_kind(plot)
    with Reporter(stream=sys.stderr) as reporter:
        found = measure(
            _pool(files, column, split),
            tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
            tells_languages=languages,
            finds_near=near,
            evaluation=[_pool([name], None, split) for name in evaluation or []],
            progress=reporter if sys.stderr.isatty() else None,
        )
    if plot is not None:
        from ftcli.files import said_when_disk_is_full
        from ftcli.reporting.lengths import draw_lengths

        lengths = {"characters": found.characters, "tokens": found.tokens}
        with said_when_disk_is_full(plot):
            plot.write_bytes(draw_lengths({unit: one.counts for unit, one in lengths.items() if one is not None}, kind))
    if as_json:
        print_json(found.to_json())
    else:
        _print_stats(found)


def _picture_kind(plot: Path | None) -> str:
    from ftcli.errors import UsageError

    kind = "svg" if plot is None else plot.suffix.lower().lstrip(".")
    if kind not in ("svg", "png"):
        raise UsageError(f"--plot: `{plot}` is neither .svg nor .png", hint="--plot lengths.svg")
    if plot is not None and not plot.parent.is_dir():
        raise UsageError(f"--plot: there is no folder `{plot.parent}`")
    return kind


def _print_stats(found: DataStats) -> None:
    from ftcli.reporting.live import plain_table
    from ftcli.units import format_bytes

    def share(count: int) -> str:
        return f"{count:,} ({count / found.num_rows:.1%})"

    print(f"{found.num_rows:,} rows, {format_bytes(found.num_bytes)}, {found.num_empty:,} without text")
    if len(found.sources) > 1:
        print("\n".join(["", *plain_table(["source", "rows"], [[name, f"{rows:,}"] for name, rows in found.sources])]))
    units = [("characters", found.characters), *([("tokens", found.tokens)] if found.tokens is not None else [])]
    lengths = [(unit, one.to_json()) for unit, one in units]
    headings = ["length", *lengths[0][1]]
    print("\n".join(["", *plain_table(headings, [[unit, *(f"{value:,.0f}" for value in one.values())] for unit, one in lengths])]))
    if found.tokens_per_byte is not None:
        print(f"{found.tokens_per_byte:.4f} tokens per byte")
    near = "" if found.repeats.near is None else f", {share(found.repeats.near)} nearly the same"
    print(f"\nrepeat an earlier row: {share(found.repeats.exact)} exactly, {share(found.repeats.same_words)} in the same words{near}")
    what = "languages" if found.are_languages else "scripts (languages are told with --languages)"
    print(f"{what}: {', '.join(f'{name} {share(count)}' for name, count in found.languages.most_common(10))}")
    for name, rows, hits, first in found.overlap:
        print(f"\n{hits:,} of {rows:,} rows of {name} stand in the data")
        for row, where in first[:5]:
            print(f"  {row}  in  {where}")


def _pool(names: Sequence[str], column: str | None, split: str) -> Pool:
    from ftcli.data.select.pool import SPLITS, Pool, open_sources

    return Pool(open_sources(names, _one_of("--split", split, SPLITS)), column)


def _one_of(option: str, found: str, allowed: Sequence[Choice]) -> Choice:
    """`found`, if it is one of `allowed`.

    Raises:
        UsageError: it is not.
    """
    from ftcli.errors import UsageError, did_you_mean

    for choice in allowed:
        if choice == found:
            return choice
    hint = did_you_mean(found, allowed) or f"one of {', '.join(f'`{choice}`' for choice in allowed)}"
    raise UsageError(f"{option}: unknown value `{found}`", hint=hint)


def _sources_of_recipe(path: Path) -> tuple[list[object], list[object]]:
    from ftcli.recipe.load import load_recipe

    data = load_recipe(path).recipe.data
    return [entry.source for entry in data.train], [entry.source for entry in data.evaluation if entry.holdout is None]


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
