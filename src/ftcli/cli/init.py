"""`ftcli init`: a first recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftcli.recipe.draft import DataLook, ModelLook


def init(
    model: Annotated[str, typer.Option("--model", help="builtin:NAME, a local folder, or a hub id.")],
    data: Annotated[str, typer.Option("--data", help="A data file, a folder, a glob, or builtin:NAME.")],
    evaluation: Annotated[str | None, typer.Option("--eval", help="Held-out data; without it, some rows of the data are held out.")] = None,
    method: Annotated[str, typer.Option("--method", help="Kind of the method: lora, qlora, full, ...")] = "lora",
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
) -> None:
    """Write a first recipe, with comments, after looking at the model and the data."""
    import json

    from ftcli.cli.console import write_text
    from ftcli.errors import UsageError
    from ftcli.recipe import draft
    from ftcli.recipe.schema import SCHEMA_FILE, json_schema

    if output.exists() and not force:
        raise UsageError(f"`{output}` is there already", hint="--force replaces it, --output writes to another file")
    draft.check_method(method)
    found_model = draft.look_at_model(model)
    found_data = draft.look_at_data(draft.open_source(data), found_model.tokenizer)
    held_out = [draft.open_source(evaluation)] if evaluation is not None else []
    if evaluation is None and data.startswith("builtin:"):
        held_out = [draft.open_source(data, split="test")]
    found_evaluation = next((draft.look_at_data(source, found_model.tokenizer) for source in held_out), None)
    text = draft.draft(found_model, found_data, found_evaluation, method, output.resolve().parent)
    write_text(output, text)
    schema_file = output.parent / SCHEMA_FILE
    write_text(schema_file, json.dumps(json_schema(), indent=2) + "\n")
    print(_describe_model(found_model))
    print(_describe_data("data", found_data))
    if found_evaluation is not None:
        print(_describe_data("evaluation", found_evaluation))
    print(f"wrote {output}, and {schema_file} for your editor")
    print(f"next: ftcli check {output}")


def _describe_model(look: ModelLook) -> str:
    context = f", {look.context} positions" if look.context is not None else ""
    template = f"none, `{look.template}` of ftcli fits" if look.template is not None else "its own"
    return f"{'model':<10}  {look.reference}: vocabulary of {look.vocab_size}{context}, chat template: {template}"


def _describe_data(title: str, look: DataLook) -> str:
    rows = f"{look.num_rows}{'' if look.is_all else ' or more'} rows"
    lengths = f"tokens: median {look.median}, 95 % up to {look.p95}, longest about {look.longest}"
    return f"{title:<10}  {look.source.label()}: {rows}, format {look.format.kind} ({', '.join(look.format.required_columns())}), {lengths}"
