"""`ftcli check RECIPE`: every proof a run begins with, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ftcli.recipe.load import LoadedRecipe
    from ftcli.training.assemble import DataParts


def check(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key: train.lr=1e-4.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Recipe, files, columns and templates only, in under a second.")] = False,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Print the first N rows of each source with their mask.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Do every check a run begins with, without training."""
    from ftcli.cli.console import print_json
    from ftcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    report = _check_fast(loaded, show, quiet=as_json) if fast else _check_all(loaded, show, quiet=as_json)
    if as_json:
        print_json(report)
    else:
        print(f"\nnext:\n  ftcli train {recipe}")


def _check_fast(loaded: LoadedRecipe, show: int, quiet: bool) -> dict[str, Any]:
    """Recipe, tokenizer, template, files, columns and the first rows; nothing heavy is imported."""
    from ftcli.data.prepare import look

    looks = look(loaded.recipe.data, loaded.recipe.model.load_tokenizer())
    if not quiet:
        for source in looks:
            print(source.line())
        print(f"ok: {loaded.path} (recipe and first rows; without --fast the rest is checked, too)")
    return {"recipe": str(loaded.path), "sources": [source.to_json() for source in looks]}


def _check_all(loaded: LoadedRecipe, show: int, quiet: bool) -> dict[str, Any]:
    """Everything: all rows, duplicates, the model, the layout, memory and disk."""
    import sys

    from ftcli.reporting.live import Reporter
    from ftcli.training.assemble import assemble_data, assemble_model, count_parameters, make_accelerator
    from ftcli.training.resources import free_disk_bytes, needed_disk_bytes, training_bytes
    from ftcli.training.run import run_folder
    from ftcli.units import format_bytes, format_count

    recipe = loaded.recipe
    with Reporter(stream=sys.stderr if quiet else None) as reporter:
        data = assemble_data(recipe, reporter)
        found = data.prepared.audit
        if show and not quiet:
            _show_rows(loaded, data, show)
        parts = assemble_model(recipe, data, make_accelerator(recipe, None))
        trainable, total = count_parameters(parts.module)
        disk, free = needed_disk_bytes(parts.module, recipe.every.keep), free_disk_bytes(run_folder(recipe).path)
        stores = [*data.prepared.train, *data.prepared.evaluation]
        for store in stores:
            reporter.note(store.report.line())
        for line in found.lines():
            reporter.note(line)
        reporter.note(f"method: {recipe.method.kind}, {format_count(trainable)} of {format_count(total)} parameters train, lr {parts.lr:g}")
        reporter.note(f"layout: {parts.layout.layout} ({parts.layout.reason})")
        reporter.note(f"steps: {data.order.num_steps} of {recipe.train.global_batch_size} examples")
        memory = training_bytes(parts.module)
        reporter.note(f"memory: about {format_bytes(memory)} for weights, gradients and optimizer, and activations on top")
        reporter.note(f"disk: at most {format_bytes(disk)} of {format_bytes(free)} free")
        reporter.note(f"ok: {loaded.path}")
    return {
        "recipe": str(loaded.path),
        "sources": [store.report.to_json() for store in stores],
        "audit": found.to_json(),
        "layout": parts.layout.to_json(),
        "parameters": {"trainable": trainable, "total": total},
        "steps": data.order.num_steps,
        "memory_bytes": memory,
        "disk_bytes": disk,
    }


def _show_rows(loaded: LoadedRecipe, data: DataParts, count: int) -> None:
    """The first rows of each source: what is learnt in green, or between brackets where there are no colours."""
    from rich.console import Console
    from rich.text import Text

    from ftcli.reporting.rows import masked_text, plain_row

    console = Console(highlight=False, soft_wrap=True)
    for store in (*data.prepared.train, *data.prepared.evaluation):
        for index in range(min(count, len(store))):
            tree = store.tree(index)
            runs = masked_text(tree, loaded.recipe.objective.target_weights(tree), data.tokenizer)
            console.print(f"--- {store.name}, row {tree.row + 1}, {len(tree)} tokens", style="bold", markup=False)
            if console.is_terminal:
                console.print(Text.assemble(*((text, "green" if weight > 0 else "dim") for text, weight in runs)))
            else:
                console.print(plain_row(runs), markup=False)
