"""`ftcli schema`: the JSON schema of recipes of every kind."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Kind(StrEnum):
    """Files that ftcli reads."""

    recipe = "recipe"
    chain = "chain"
    evaluation = "evaluation"
    comparison = "comparison"


def schema(
    kind: Annotated[
        Kind, typer.Argument(help="Of a training recipe, a chain of stages, an evaluation, or compare-approaches.")
    ] = Kind.recipe,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")] = None,
) -> None:
    """Print the JSON schema of recipes, for editors.

    A recipe that begins with `# yaml-language-server: $schema=recipe.schema.json` is checked against it while you type.
    """
    import json

    text = json.dumps(_schema(kind), indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        from ftcli.cli.console import write_text

        write_text(output, text)
        typer.echo(f"wrote {output}", err=True)


def _schema(kind: Kind) -> Any:
    from ftcli.recipe.schema import json_schema, schema_of

    match kind:
        case Kind.chain:
            from ftcli.recipe.chain import TITLE, Chain

            return schema_of(Chain, TITLE)
        case Kind.evaluation:
            from ftcli.evaluation import recipe as evaluation

            return schema_of(evaluation.EvaluationRecipe, evaluation.TITLE)
        case Kind.comparison:
            from ftcli.evaluation.approaches import recipe as comparison

            return schema_of(comparison.Comparison, comparison.TITLE)
    return json_schema()
