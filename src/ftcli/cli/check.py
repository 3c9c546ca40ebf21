"""`ftcli check RECIPE`: every proof a run begins with, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ftcli.data.tree import TokenTree
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.load import LoadedRecipe
    from ftcli.recipe.recipe import Recipe


def check(
    recipe: Annotated[Path, typer.Argument(help="The YAML recipe.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key: train.lr=1e-4.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Recipe, files, columns and templates only, in under a second.")] = False,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Print the first N rows of each source with their mask.")] = 0,
    after: Annotated[Path | None, typer.Option(metavar="RUN", help="As `ftcli train --after RUN` would begin; may merge RUN.")] = None,
    replay_rows: Annotated[int, typer.Option(min=0, help="With --after: rows of earlier data to replay.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Do every check a run begins with, without training."""
    import shlex

    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.errors import UsageError
    from ftcli.recipe.chain import is_chain, load_chain, on_first_base
    from ftcli.recipe.load import load_recipe

    if after is not None and is_chain(recipe):
        raise UsageError("--after is not for a recipe with stages")
    one = _check_fast if fast else _check_all
    if is_chain(recipe):
        report: dict[str, Any] = {"stages": {}}
        with words_on_stderr(as_json):
            for name, stage in on_first_base(load_chain(recipe, overrides or ())):
                print(f"stage {name}")
                report["stages"][name] = one(stage, show)
    else:
        loaded = load_recipe(recipe, overrides or (), follows=after is not None and replay_rows > 0)
        with words_on_stderr(as_json):
            report = one(loaded if after is None else _following(loaded, after, replay_rows), show)
    if as_json:
        print_json(report)
    else:
        changes = [part for override in overrides or () for part in ("--set", override)]
        changes += [] if after is None else ["--after", str(after), "--replay-rows", str(replay_rows)]
        print(f"\nnext:\n  {shlex.join(['ftcli', 'train', str(recipe), *changes])}")


def _following(loaded: LoadedRecipe, after: Path, replay_rows: int) -> LoadedRecipe:
    """The recipe as it goes on from another run."""
    from ftcli.reporting.live import Reporter
    from ftcli.training.after import follow

    with Reporter() as reporter:
        return follow(loaded, after, replay_rows, reporter)


def _check_fast(loaded: LoadedRecipe, show: int) -> dict[str, Any]:
    """Recipe, tokenizer, template, files, columns and the first rows; nothing heavy is imported."""
    from ftcli.data.look import look
    from ftcli.recipe.trackers import require_trackers

    require_trackers(loaded.recipe.trackers)
    model = loaded.recipe.model
    tokenizer = model.load_tokenizer()
    if model.grow is not None and model.base is not None:
        from ftcli.models.grow.growth import require_growth_fits
        from ftcli.models.locate import model_folder

        require_growth_fits(model_folder(model.base, model.revision, weights=False), model.grow)
    elif getattr(loaded.recipe.method, "grown", False) and model.base is not None:
        from ftcli.models.grow.growth import require_grown
        from ftcli.models.locate import model_folder

        require_grown(model_folder(model.base, model.revision, weights=False))
    looks = look(loaded.recipe.data, tokenizer, formats=loaded.recipe.objective.formats)
    if loaded.recipe.objective.regularize:
        from ftcli.training.regularizer_look import look_at_regularizers

        looks += look_at_regularizers(loaded.recipe, tokenizer)
    rows = [(f"{look.name} ({where})", tree) for look in looks for where, tree in list(zip(look.wheres, look.trees, strict=True))[:show]]
    _show_rows(rows, loaded, tokenizer)
    for source in looks:
        print(source.line())
        if source.unread is not None:
            print(f"{source.name} {source.unread}")
    print(f"ok: {loaded.path} (recipe and first rows; without --fast the rest is checked, too)")
    return {"recipe": str(loaded.path), "sources": [source.to_json() for source in looks]}


def _check_all(loaded: LoadedRecipe, show: int) -> dict[str, Any]:
    """Everything: all rows, duplicates, the model, the layout, memory and disk."""
    from ftcli.reporting.live import Reporter
    from ftcli.training.assemble import assemble_data, assemble_model, count_parameters, load_base, make_accelerator, settled
    from ftcli.training.frozen_cache import plan_frozen_cache
    from ftcli.training.regularizer_look import look_at_regularizers
    from ftcli.training.regularizers import require_regularizers
    from ftcli.training.resources import (
        free_disk_bytes,
        held_bytes,
        memory_parts,
        needed_disk_bytes,
        require_disk,
        require_memory,
        training_bytes,
    )
    from ftcli.training.run import run_folder
    from ftcli.units import format_bytes, format_count

    recipe, folder = loaded.recipe, run_folder(loaded.recipe)
    with Reporter() as reporter:
        look_at_regularizers(recipe, recipe.model.load_tokenizer())
        data = assemble_data(recipe, reporter)
        recipe = settled(recipe, data)
        reporter.close()
        stores = [*data.prepared.train, *data.prepared.evaluation]
        rows = [(store.where(index), store.tree(index)) for store in stores for index in range(min(show, len(store)))]
        _show_rows(rows, loaded, data.tokenizer)
        for line in (*(store.report.line() for store in stores), *data.prepared.notes):
            reporter.note(line)
        accelerator = make_accelerator(recipe, None)
        parts = assemble_model(recipe, data, accelerator)
        trainable, total = count_parameters(parts.module)
        reporter.note(f"method: {recipe.method.kind}, {format_count(trainable)} of {format_count(total)} parameters train, lr {parts.lr:g}")
        reporter.note(f"layout: {parts.layout.layout} ({parts.layout.reason})")
        reporter.note(f"steps: {data.order.num_steps} of {recipe.train.global_batch_size} examples")
        if (words := recipe.method.what_trains(parts.module)) is not None:
            reporter.note(f"trains {words}")
        at_work = recipe.method.share_at_work(parts.module)
        held = held_bytes(recipe, parts.module)
        memory, disk = training_bytes(parts.module, at_work, held), needed_disk_bytes(parts.module, recipe.every.keep)
        reporter.note(f"memory: about {format_bytes(memory)} for {memory_parts(held)}, and activations on top")
        reporter.note(f"disk: at most {format_bytes(disk)} of {format_bytes(free_disk_bytes(folder.path))} free")
        require_memory(parts.module, accelerator.device, at_work, held)
        require_disk(folder.path, parts.module, recipe.every.keep)
        require_regularizers(recipe, data, parts, accelerator, lambda other: load_base(other, data.tokenizer, accelerator.device), reporter)
        plan_frozen_cache(recipe, data, parts, accelerator, folder.path, reporter.note)
        if folder.resolved_path.exists():
            reporter.note(f"{folder.path} already holds a run: `ftcli train --resume` goes on with it")
        reporter.note(f"ok: {loaded.path}")
    return {
        "recipe": str(loaded.path),
        "sources": [store.report.to_json() for store in stores],
        "audit": data.prepared.audit.to_json(),
        "notes": list(data.prepared.notes),
        "layout": parts.layout.to_json(),
        "parameters": {"trainable": trainable, "total": total},
        "steps": data.order.num_steps,
        "memory_bytes": memory,
        "disk_bytes": disk,
    }


def _shown_weights(tree: TokenTree, recipe: Recipe) -> Any:
    """The weight of each token as a target; what has a label has no such tokens."""
    from ftcli.data.tree import target_weights

    return target_weights(tree, 0.0) if tree.labels is not None else recipe.objective.pose(tree).target_weights


def _show_rows(rows: Sequence[tuple[str, TokenTree]], loaded: LoadedRecipe, tokenizer: Tokenizer) -> None:
    """(title, tree) as text: what is learnt in green, or between brackets where there are no colours."""
    if not rows:
        return
    from rich.console import Console
    from rich.text import Text

    from ftcli.reporting.rows import STYLES, masked_text, plain_row

    console = Console(highlight=False, soft_wrap=True)
    for title, tree in rows:
        runs = masked_text(tree, _shown_weights(tree, loaded.recipe), tokenizer)
        label = "" if tree.labels is None else f", label: {', '.join(tree.labels) or 'none'}"
        console.print(f"--- {title}, {len(tree)} tokens{label}", style="bold", markup=False)
        if console.is_terminal:
            console.print(Text.assemble(*((text, STYLES["target" if weight > 0 else "context"]) for text, weight in runs)))
        else:
            console.print(plain_row(runs), markup=False)
