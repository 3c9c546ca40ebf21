"""`ftcli report RUN...`: one page that tells a run, or several beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[list[str], typer.Argument(help="Run folders, or names of runs in the runs folder.", show_default=False)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The page; a .md beside it has the same words.", show_default=False)]
Folder = Annotated[Path, typer.Option("--folder", "-f", help="Where the runs are.")]


def report(runs: Runs, output: Output = None, folder: Folder = Path("runs")) -> None:
    """Write a run's report anew, or one of several runs: curves over each other, recipes, the same rows compared.

    One HTML file that fetches nothing, and the same as Markdown. Of one run they go into its folder, of several to
    report.html here, unless --output says otherwise.
    """
    from ftcli.cli.console import write_text
    from ftcli.errors import UsageError
    from ftcli.reporting.found_run import find_run, read_run
    from ftcli.reporting.markdown import markdown_text
    from ftcli.reporting.page import html_page
    from ftcli.reporting.report import REPORT, run_document
    from ftcli.reporting.several import several_document

    found = [read_run(find_run(name, folder)) for name in runs]
    document = run_document(found[0]) if len(found) == 1 else several_document(found)
    page = output or (found[0].path / REPORT if len(found) == 1 else Path(REPORT))
    if page.suffix != ".html":
        raise UsageError(f"--output {page}: a report is a .html file", hint=f"{page.with_suffix('.html')}; the .md is written beside it")
    write_text(page, html_page(document))
    write_text(page.with_suffix(".md"), markdown_text(document))
    print(f"{page} and {page.with_suffix('.md').name}")
