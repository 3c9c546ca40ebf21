"""`ftcli cache`: list or clear the cache: tokenised data, and what else is kept beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftcli.data.cache import CacheEntry
    from ftcli.data.cache_rooms import Room

app = typer.Typer(help="List or clear the cache: tokenised data, replay text, audits, hashes, tokenizers.", invoke_without_command=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Keys = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY]...",
        help="Keys, beginnings of keys, or names of rooms (`self`, `audits`, ...); without any, all but `tokenizers`.",
        show_default=False,
    ),
]
OlderThan = Annotated[float | None, typer.Option("--older-than", metavar="DAYS", min=0, help="Only entries not used for so many days.")]


@app.callback()
def cache(context: typer.Context, as_json: AsJson = False) -> None:
    """List or clear the cache; without a command, list it."""
    if context.invoked_subcommand is None:
        ls(as_json)


@app.command()
def ls(as_json: AsJson = False) -> None:
    """List the cache: tokenised sources with rows, tokens, size, age and last use (unfinished ones are what a stopped run goes on from),
    and the size of everything else."""
    from dataclasses import asdict

    from ftcli.cli.console import print_json
    from ftcli.data.cache import default_cache_folder, entries
    from ftcli.data.cache_rooms import rooms

    folder = default_cache_folder()
    found, others = entries(folder), rooms(folder)
    if as_json:
        print_json({"folder": str(folder), "entries": [asdict(entry) for entry in found], "rooms": [asdict(room) for room in others]})
        return
    if not found and not others:
        print(f"the cache is empty: {folder}")
        return
    if found:
        _print_table(found)
    if others:
        print("\n" * bool(found) + "\n".join(_room_lines(others)) + "\n")
    print(f"{_total(found, others)} in {folder}")


@app.command()
def clear(keys: Keys = None, older_than: OlderThan = None, as_json: AsJson = False) -> None:
    """Remove what is in the cache; what a running process is making is left alone, and so are tokenizers unless they are named: a run
    copies its own when it saves."""
    from dataclasses import asdict

    from ftcli.cli.console import print_json
    from ftcli.data.cache import clear as clear_cache
    from ftcli.data.cache import default_cache_folder
    from ftcli.data.cache_rooms import WHAT, clear_rooms, rooms

    folder, named = default_cache_folder(), list(keys or [])
    names = {room.name for room in rooms(folder)} | set(WHAT)
    in_rooms, in_store = [key for key in named if key in names], [key for key in named if key not in names]
    # First the store: it refuses a key that nobody knows before anything is removed.
    removed, busy = clear_cache(folder, in_store, older_than) if in_store or not named else ([], [])
    emptied, left = clear_rooms(folder, in_rooms, older_than) if in_rooms or not named else ([], {})
    if as_json:
        told = {"removed": [entry.key for entry in removed], "busy": [entry.key for entry in busy]}
        print_json({"folder": str(folder), **told, "rooms": [asdict(room) for room in emptied], "busy_rooms": left})
        return
    print(f"removed {_total(removed, emptied)} from {folder}")
    for entry in busy:
        print(f"left {entry.key}: another process is making it")
    for name, count in left.items():
        print(f"left {count} in {name}: another process may be writing there")


def _total(found: list[CacheEntry], others: list[Room]) -> str:
    from ftcli.units import format_bytes

    count = len(found) + sum(room.entries for room in others)
    num_bytes = sum(entry.num_bytes for entry in found) + sum(room.num_bytes for room in others)
    return f"{'1 entry' if count == 1 else f'{count} entries'} ({format_bytes(num_bytes)})"


def _room_lines(others: list[Room]) -> list[str]:
    from ftcli.units import format_bytes

    lines = [["room", "entries", "size", "what"]]
    lines += [[room.name, f"{room.entries:,}", format_bytes(room.num_bytes), room.what] for room in others]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        f"{name.ljust(widths[0])}  {count.rjust(widths[1])}  {size.rjust(widths[2])}  {what}".rstrip() for name, count, size, what in lines
    ]


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
