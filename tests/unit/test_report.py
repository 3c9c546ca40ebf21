"""The report of a run and of several: what it says, in HTML and in Markdown, and that a browser shows it without overflow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.fake_run import train_record, write_fake_run, write_lines

from ftcli.cli.main import run as ftcli
from ftcli.reporting.found_run import read_run
from ftcli.reporting.markdown import fenced, markdown_text
from ftcli.reporting.page import Code, Document, Figure, Section, Table, html_page
from ftcli.reporting.report import report_page, run_document
from ftcli.reporting.rows_compared import paired, read_scores
from ftcli.reporting.several import several_document

SAMPLES = [
    {
        "source": "orders",
        "where": "row 1",
        "pieces": [["<|im_start|>user\ntwo <teas><|im_end|>\n<|im_start|>assistant\n", 0.0], ['{"tea": 2}<|im_end|>', 1.0]],
        "foreign_markers": [],
    }
]


def write_scores(path: Path, before: list[float], after: list[float]) -> None:
    """Per-row scores of one metric, before and after 40 steps."""
    records: list[dict[str, Any]] = []
    for step, values in ((0, before), (40, after)):
        records += [{"step": step, "source": "orders", "where": f"row {i}", "scores": {"exact-match": v}} for i, v in enumerate(values)]
    write_lines(path / "scores.jsonl", records)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = write_fake_run(tmp_path / "runs" / "orders", mask_samples=SAMPLES, peak_memory_bytes={"process": 3 * 2**30}, notes=["a note"])
    write_scores(path, [0.0] * 49 + [1.0], [1.0] * 46 + [0.0] * 4)
    return path


def test_the_verdict_comes_first_and_every_part_has_its_place(run: Path) -> None:
    document = run_document(read_run(run))
    titles = [section.title for section in document.sections if section.blocks]
    assert titles == [
        "Diagnosis",
        "Before and after",
        "Forgetting",
        "Curves",
        "Answers before and after",
        "Proofs",
        "Data",
        "What is learnt of a row",
        "Cost",
        "Recipe, and how to do it again",
        "Environment",
    ]
    assert document.lead[1] == "Not proven: generation stops. The diagnosis found nothing wrong."


def test_metrics_carry_intervals_and_the_same_rows_are_compared(run: Path) -> None:
    page = report_page(read_run(run))
    # Wilson's interval of 46 of 50
    assert "81.2 to 96.8 %" in page
    compared = paired(*read_scores(run).values())
    assert compared[0].cells()[:3] == ["orders", "exact-match", "better"]
    assert (compared[0].comparison.num_only_a, compared[0].comparison.num_only_b) == (46, 1)


def test_an_interval_is_left_out_where_the_rows_do_not_make_the_value(run: Path) -> None:
    write_scores(run, [0.0] * 50, [1.0] * 25 + [0.0] * 25)  # the run says 92 %
    assert "36.6 to 63.4 %" not in "".join(str(section) for section in run_document(read_run(run)).sections)


def test_the_loss_has_the_interval_of_its_standard_error(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["sources"]["orders"]["loss_error"] = 0.01
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert "0.1804 to 0.2196" in report_page(read_run(run))


def test_each_regularizer_has_a_row_and_a_curve(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "held", num_logged=3)
    held = [{"kl.0": 0.0, "kl.2": 0.5}, {"kl.0": 0.3, "kl.2": 0.4}, {"kl.0": 0.25, "kl.2": 0.25}]
    write_lines(path / "metrics.jsonl", [{**train_record(step), "loss": 0.5, "regularizers": held[step - 1]} for step in (1, 2, 3)])
    settings = "[{kind: kl, on: replay, weight: 0.5}, {kind: ewc, weight: 0}, {kind: kl, decoupled: false, cache: {top_k: 4}}]"
    for name in ("recipe.yaml", "recipe.resolved.yaml"):
        (path / name).write_text(f"method: {{kind: full}}\nobjective: {{kind: causal-lm, regularize: {settings}}}\n")
    section = next(s for s in run_document(read_run(path)).sections if s.title == "Held near the start")
    table, *figures = section.blocks
    assert isinstance(table, Table)
    assert table.rows == [
        ["kl.0", "on replay", "0.5", "0", "0.3", "0.25", "25.0%"],
        ["kl.2", "cache", "default", "0.5", "0.5", "0.25", "25.0%"],
    ]
    assert [
        isinstance(figure, Figure) and figure.alt.startswith(name) for figure, name in zip(figures, ("what kl.0", "what kl.2"), strict=True)
    ]
    assert "| kl.0 | on replay | 0.5 |" in markdown_text(run_document(read_run(path)))


def test_answers_are_marked_where_they_are_not_the_reference(run: Path) -> None:
    page = report_page(read_run(run))
    assert "<mark>Once</mark>" in page
    assert "two &lt;teas&gt;" in page
    assert re.search(r"<h4>after</h4><pre>\{&quot;tea&quot;: 2\}</pre>", page)


def test_what_is_learnt_of_a_row_is_marked(run: Path) -> None:
    assert "<mark>{&quot;tea&quot;: 2}&lt;|im_end|&gt;</mark>" in report_page(read_run(run))


def test_tables_have_headers_and_figures_have_words(run: Path) -> None:
    page = report_page(read_run(run))
    assert page.count("<table>") == page.count("<caption>") > 5
    assert '<th scope="col">' in page
    assert '<th scope="row">' in page
    assert page.count("<svg") == page.count('role="img" aria-label="') == 4
    assert "losses over steps: train from 1.86 to 0.0996" in page


def test_the_markdown_says_what_the_page_says(run: Path) -> None:
    text = markdown_text(run_document(read_run(run)))
    assert text.startswith("# orders\n\n**finished**\n\nlora rank 8 on builtin:tiny")
    for part in ("81.2 to 96.8 %", "3.0 GiB", "a note", "generation stops", "⟦Once⟧", "ftcli verify", "rank: 8"):
        assert part in text


def test_a_fence_is_longer_than_any_inside() -> None:
    assert fenced("a\n```\nb") == "````\na\n```\nb\n````"


def test_several_runs_are_compared_row_by_row_and_by_cost(run: Path, tmp_path: Path) -> None:
    other = write_fake_run(tmp_path / "runs" / "cheap", lr="1e-3", seconds=10.0, parameters={"trainable": 10, "total": 3000})
    write_scores(other, [0.0] * 50, [1.0] * 30 + [0.0] * 20)
    document = several_document([read_run(run), read_run(other)])
    text = markdown_text(document)
    assert "train.lr: 2e-4 -\\> 1e-3" in text
    assert "| cheap | orders | exact-match | worse | -32.0" in text
    assert "Not beaten in both seconds in steps and exact-match on orders: cheap" in text
    assert html_page(document).count("<svg") > 4


def test_runs_without_values_of_the_same_rows_say_why_they_are_not_compared(run: Path, tmp_path: Path) -> None:
    without, elsewhere, renamed = (write_fake_run(tmp_path / "runs" / name) for name in ("without", "elsewhere", "renamed"))
    write_scores(elsewhere, [0.0] * 2, [1.0] * 2)
    lines = (elsewhere / "scores.jsonl").read_text()
    (renamed / "scores.jsonl").write_text(lines.replace("orders", "teas"))
    (elsewhere / "scores.jsonl").write_text(lines.replace("row ", "line "))
    text = markdown_text(several_document([read_run(path) for path in (run, without, elsewhere, renamed)]))
    assert "without is not compared with orders row by row: without kept no values of single rows." in text
    assert "elsewhere is not compared with orders row by row: they measured other rows." in text
    assert "renamed is not compared with orders row by row: they measured no metric of the same source." in text
    assert "--against OTHER" in text
    same = tmp_path / "runs" / "same"
    shutil.copytree(run, same)
    assert "is not compared with" not in markdown_text(several_document([read_run(run), read_run(same)]))


def test_the_losses_of_several_runs_have_intervals(run: Path, tmp_path: Path) -> None:
    other = write_fake_run(tmp_path / "runs" / "cheap")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["sources"]["orders"]["loss_error"] = 0.01
    (other / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    text = markdown_text(several_document([read_run(run), read_run(other)]))
    assert "| orders | loss | 0.2000 | 0.2000 (0.1804 to 0.2196) |" in text


def test_reports_are_written_of_measures_that_are_no_numbers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN and infinity stand in files as null."""
    sick = write_fake_run(tmp_path / "runs" / "sick")
    text = (sick / "metrics.jsonl").read_text()
    sick_text = re.sub(r'"(loss|perplexity|bits_per_byte|grad_norm|stories|exact-match|lr)": [-0-9.e]+', r'"\1": null', text)
    assert sick_text.count("null") > 100
    (sick / "metrics.jsonl").write_text(sick_text)
    manifest = json.loads((sick / "manifest.json").read_text())
    (sick / "manifest.json").write_text(json.dumps({**manifest, "seconds": None, "lr": None, "before": {"orders": {"loss": None}}}))
    (sick / "scores.jsonl").write_text((run / "scores.jsonl").read_text().replace("1.0", "null"))
    assert "sick" in markdown_text(run_document(read_run(sick)))
    assert "sick" in markdown_text(several_document([read_run(sick), read_run(run), read_run(sick)]))
    # Of one run only the retained loss is none: no figure is drawn by that loss.
    partly = write_fake_run(tmp_path / "runs" / "partly")
    lines = (partly / "metrics.jsonl").read_text().splitlines()
    (partly / "metrics.jsonl").write_text("\n".join([*lines[:-1], lines[-1].replace('"loss": 1.36', '"loss": null')]) + "\n")
    assert "loss on stories (retained)" not in markdown_text(several_document([read_run(run), read_run(partly)]))
    one, both = str(sick), [str(sick), str(run)]
    for command in (
        ["runs", "ls", str(sick.parent)],
        ["runs", "show", one],
        ["runs", "compare", *both],
        ["watch", one, "--once"],
        ["diagnose", *both],
    ):
        assert ftcli(command) == 0, command
        assert capsys.readouterr().out


def test_the_command_writes_page_and_markdown(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ftcli(["report", "orders"]) == 0
    assert {"report.html", "report.md"} <= {path.name for path in run.iterdir()}
    write_fake_run(tmp_path / "runs" / "again")
    assert ftcli(["report", "orders", "again", "-o", "both.html"]) == 0
    assert (tmp_path / "both.md").read_text().startswith("# 2 runs")
    assert ftcli(["report", "orders", "again", "-o", "both.pdf"]) == 2


# Writes what a page measures of itself into its title, as headless chromium can only print the page.
PROBE = """<script>
window.errors = [];
window.addEventListener('error', event => window.errors.push(event.message));
window.addEventListener('load', () => {
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.tagName);
  const shut = [...document.querySelectorAll('details')]; shut.forEach(e => e.open = true);
  const letters = [...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height).filter(h => h > 0);
  const cut = [...document.querySelectorAll('.scroll[aria-label="The runs"]')].filter(e => e.scrollWidth > e.clientWidth + 1);
  const measured = {cut: cut.length, page: document.documentElement.scrollWidth, window: document.documentElement.clientWidth, wide: wide,
    errors: window.errors, letter: Math.min(...letters)};
  document.body.innerHTML = '<pre id="measured">' + JSON.stringify(measured) + '</pre>';
});
</script>"""


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium is installed")
    return found


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_overflows_in_a_browser_and_no_error_is_logged(width: int, run: Path, tmp_path: Path) -> None:
    chromium = browser()
    name = "a-very-long-name-of-a-run-that-somebody-gave-it-" * 3
    long = write_fake_run(tmp_path / "runs" / name, mask_samples=SAMPLES)
    for index, document in enumerate((run_document(read_run(run)), several_document([read_run(run), read_run(long)]))):
        page = tmp_path / f"page-{index}.html"
        # A frame has the width of a phone; the window of a headless browser may not be that narrow.
        inner = tmp_path / f"inner-{index}.html"
        inner.write_text(html_page(document).replace("</head>", PROBE + "</head>"), encoding="utf-8")
        frame = f'<iframe id="frame" src="{inner.name}" style="width:{width}px;height:900px;border:0"></iframe>'
        reader = "<script>onload = () => document.title = frames[0].document.getElementById('measured').textContent</script>"
        page.write_text(f"<!doctype html><title>none</title><body>{frame}{reader}", encoding="utf-8")
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr", "--v=0"]
        command = [chromium, *arguments, "--virtual-time-budget=4000", "--window-size=1500,1000", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
        assert found is not None, done.stdout[:500]
        measured = json.loads(found.group(1))
        assert measured["wide"] == []
        assert measured["cut"] == 0  # the last column of the runs is seen without scrolling
        assert measured["page"] <= measured["window"]
        assert width - 20 <= measured["window"] <= width  # a scroll bar takes some
        assert measured["errors"] == []
        assert measured["letter"] >= 8
        assert "CONSOLE" not in done.stderr


def test_a_table_without_rows_and_a_hostile_caption_make_no_markup() -> None:
    bad = '"><script>'
    blocks = [Table(bad, ["a"], []), Table(bad, [bad], [[bad]]), Code(bad, bad), Figure("<svg></svg>", bad)]
    page = html_page(Document(bad, bad, "soft", [bad], [Section(bad, blocks)]))
    assert "<script" not in page


def test_points_at_the_top_of_a_figure_have_room_and_are_not_clipped() -> None:
    from ftcli.reporting.curves import Line, line_figure

    figure = line_figure([Line("held out", [(0, 6.9), (3, 6.9)], "evaluation", 0)], "loss", "a loss")
    assert figure is not None
    drawn = next(part for part in figure.svg.split("<g id=") if "stroke-dasharray: " in part)
    assert "clip-path" not in drawn


def test_tables_of_a_page_scroll_within_their_box_on_a_phone() -> None:
    from ftcli.reporting.page import STYLE

    assert ".scroll { overflow-x: auto;" in STYLE
    assert "@media (max-width: 30rem) { table {" in STYLE
