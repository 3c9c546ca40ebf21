"""`ftcli merge RECIPE.yaml` for merges of adapters and for searches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftcli.merging.special import Special


def carry_out_special(
    special: Special, output: Path | None, *, dry_run: bool, threads: int | None, resume: bool, verify: bool, as_json: bool
) -> None:
    """Print what would be done, or do it and print the report."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.errors import UsageError
    from ftcli.merging.search.run import left_behind

    if resume:
        what = "--resume is for merges of models"
        raise UsageError(what, hint="a search goes on by itself from its log of evaluations; a merge of adapters takes seconds")
    if dry_run:
        if as_json:
            print_json({"plan": special.plan()})
        else:
            print("\n".join(special.plan()))
        return
    from ftcli.reporting.live import Reporter

    assert output is not None
    with words_on_stderr(as_json), Reporter() as reporter:
        try:
            report = special.run(output, threads=threads, verify=verify, say=reporter.update, note=reporter.note)
        finally:
            if (left := left_behind(output)) is not None:
                reporter.note(left)
        for line in report["lines"]:
            reporter.note(line)
    if as_json:
        print_json(report)
