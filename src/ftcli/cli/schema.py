"""`ftcli schema`: the JSON schema of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def schema(output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")] = None) -> None:
    """Print the JSON schema of recipes, for editors.

    A recipe that begins with `# yaml-language-server: $schema=recipe.schema.json` is checked against it while you type.
    """
    import json

    from ftcli.recipe.schema import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if output is None:
        print(text, end="")
    else:
        from ftcli.cli.console import write_text

        write_text(output, text)
        typer.echo(f"wrote {output}", err=True)
