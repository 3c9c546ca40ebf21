"""`ftcli cache`: list or clear the cache of tokenised data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftcli.data.cache import CacheEntry

app = typer.Typer(help="List or clear the cache of tokenised data.", invoke_without_command=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Keys = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys, or beginnings of keys; without any, all entries.", show_default=False)
]
OlderThan = Annotated[float | None, typer.Option("--older-than", metavar="DAYS", min=0, help="Only entries not used for so many days.")]


@app.callback()
def cache(context: typer.Context, as_json: AsJson = False) -> None:
    """List or clear the cache of tokenised data; without a command, list it."""
    if context.invoked_subcommand is None:
        ls(as_json)


@app.command()
def ls(as_json: AsJson = False) -> None:
    """List the cache: source, rows, tokens, size, age, last use; unfinished entries are what a stopped run goes on from."""
    from dataclasses import asdict

    from ftcli.cli.console import print_json
    from ftcli.data.cache import default_cache_folder, entries

    folder = default_cache_folder()
    found = entries(folder)
    if as_json:
        print_json({"folder": str(folder), "entries": [asdict(entry) for entry in found]})
    elif found:
        _print_table(found)
        print(f"{_total(found)} in {folder}")
    else:
        print(f"the cache is empty: {folder}")


@app.command()
def clear(keys: Keys = None, older_than: OlderThan = None, as_json: AsJson = False) -> None:
    """Remove entries from the cache; what a running process is making is left alone."""
    from ftcli.cli.console import print_json
    from ftcli.data.cache import clear as clear_cache
    from ftcli.data.cache import default_cache_folder

    folder = default_cache_folder()
    removed, busy = clear_cache(folder, keys or [], older_than)
    if as_json:
        print_json({"folder": str(folder), "removed": [entry.key for entry in removed], "busy": [entry.key for entry in busy]})
        return
    print(f"removed {_total(removed)} from {folder}")
    for entry in busy:
        print(f"left {entry.key}: another process is making it")


def _total(found: list[CacheEntry]) -> str:
    from ftcli.units import format_bytes

    entries = "1 entry" if len(found) == 1 else f"{len(found)} entries"
    return f"{entries} ({format_bytes(sum(entry.num_bytes for entry in found))})"


def _print_table(found: list[CacheEntry]) -> None:
    """Never cut to the width of the terminal: keys and names are there to be copied."""
    import time

    from ftcli.units import format_bytes, format_count, format_seconds

    now = time.time()
    lines = [["key", "source", "rows", "tokens", "size", "age", "last used"]]
    for entry in found:
        counts = ["" if count is None else format_count(count) for count in (entry.rows, entry.tokens)]
        ages = [format_seconds(max(0.0, now - moment)) for moment in (entry.created, entry.last_used)]
        lines.append([entry.key[:12], entry.source or "(unfinished)", *counts, format_bytes(entry.num_bytes), *ages])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for key, source, *numbers in lines:
        names = [key.ljust(widths[0]), source.ljust(widths[1])]
        print("  ".join([*names, *(number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True))]).rstrip())
