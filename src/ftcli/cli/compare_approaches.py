"""`ftcli compare-approaches COMPARISON.yaml`: prompting, solved examples, retrieval and fine-tuning side by side on one task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("compare-approaches")
def compare_approaches(
    comparison: Annotated[Path, typer.Argument(help="The comparison (YAML): a task, training rows, approaches.")],
    device: Annotated[str, typer.Option("--device", help="Where to measure: auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Prompt, show examples, look up, fine-tune: compare them on your task, with a verdict."""
    from ftcli.cli.console import print_json, words_on_stderr, write_text
    from ftcli.evaluation.approaches.recipe import load_comparison

    asked, text = load_comparison(comparison)
    with words_on_stderr(as_json):
        from ftcli.evaluation.approaches.conduct import conduct
        from ftcli.evaluation.approaches.outcome import outcome_of
        from ftcli.evaluation.approaches.page import document, terminal_lines
        from ftcli.files import write_json
        from ftcli.reporting.live import Reporter
        from ftcli.reporting.markdown import markdown_text
        from ftcli.reporting.page import html_page

        with Reporter(shows_next=False) as reporter:
            outcome = outcome_of(asked, *conduct(asked, text, reporter, device))
        write_json(asked.folder / "results.json", outcome)
        write_text(asked.folder / "report.md", markdown_text(document(outcome)))
        write_text(asked.folder / "report.html", html_page(document(outcome)))
    if as_json:
        print_json(outcome)
        return
    print("\n".join(terminal_lines(outcome)))
    print(f"\n{asked.folder / 'report.html'}")
