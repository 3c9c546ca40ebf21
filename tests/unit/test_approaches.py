"""A comparison of approaches: what may be said, and what the numbers are taken to say."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import ROOT

from ftcli.errors import RecipeError
from ftcli.evaluation.approaches.page import document, table_of, terminal_lines
from ftcli.evaluation.approaches.recipe import load_comparison
from ftcli.evaluation.approaches.verdict import Approach, compare_pairs, judge
from ftcli.evaluation.tasks.task import mean_figure, share_figure
from ftcli.reporting.markdown import markdown_text
from ftcli.reporting.page import html_page

ROWS = 40
WHERE = [f"r:{place}" for place in range(ROWS)]


def approach(
    name: str, right: int, *, is_trained: bool = False, looks_up: bool = False, cost: float = 10.0, changed: Any = None
) -> Approach:
    """One that has the first `right` per cent of the rows right."""
    values = (np.arange(ROWS) < right * ROWS / 100).astype(np.float64)
    return Approach(name, is_trained, looks_up, share_figure(values), WHERE, cost, changed)


def told(*, base: int = 20, lookup: int | None = None, tuned: int | None = None, both: int | None = None) -> Any:
    found = [approach("base", base)]
    found += [approach("lookup", lookup, looks_up=True, cost=90)] if lookup is not None else []
    found += [approach("tuned", tuned, is_trained=True)] if tuned is not None else []
    found += [approach("both", both, is_trained=True, looks_up=True, cost=90)] if both is not None else []
    return judge(found, "exact_match", ROWS)


@pytest.mark.parametrize(
    ("numbers", "finding"),
    [
        ({"lookup": 20, "tuned": 90, "both": 90}, "form"),
        ({"lookup": 90, "tuned": 20, "both": 90}, "facts"),
        ({"lookup": 60, "tuned": 60, "both": 95}, "both"),
        ({"lookup": 20, "tuned": 60, "both": 95}, "both"),
        ({"lookup": 20, "tuned": 20, "both": 20}, "neither"),
        ({"lookup": 25, "tuned": 27}, "neither"),
        ({"lookup": 5, "tuned": 5}, "neither"),
        ({"tuned": 90}, "open"),
        ({"lookup": 90}, "open"),
    ],
)
def test_the_finding_follows_the_gains(numbers: dict[str, int], finding: str) -> None:
    assert told(**numbers).finding == finding


def test_the_verdict_names_its_evidence_and_what_was_not_tried() -> None:
    text = " ".join(told(tuned=90).sentences)
    assert "tuned against base" in text
    assert "+0.7 (" in text
    assert "Not tried: retrieval." in text
    assert "looks like facts" not in text


def test_a_difference_that_is_not_shown_is_not_said_to_be_absent() -> None:
    text = " ".join(told(lookup=25, tuned=30).sentences)
    assert "not shown to be more than chance (detectable from" in text
    assert "base costs less and is not shown to be worse" in text


def test_the_cheapest_that_is_not_shown_to_be_worse_is_named() -> None:
    assert "tuned costs less and is not shown to be worse" in told(lookup=20, tuned=90, both=95).sentences[-1]
    assert "it is shown to beat every other" in told(tuned=90).sentences[-1]


def test_where_less_is_better_the_signs_are_turned() -> None:
    low, high = np.linspace(0, 1, ROWS), np.linspace(0, 1, ROWS) + 1
    better = Approach("better", True, False, mean_figure(low, higher_is_better=False), WHERE, 1)
    worse = Approach("worse", False, False, mean_figure(high, higher_is_better=False), WHERE, 1)
    (pair,) = compare_pairs([(better, worse)])
    assert pair.gains
    assert judge([worse, better], "loss", ROWS).sentences[-1].startswith("Best measured: better")


def test_pairs_are_compared_on_the_rows_that_both_have_and_corrected_once() -> None:
    short = Approach("short", False, False, share_figure(np.ones(20)), WHERE[:20], 1)
    pairs = compare_pairs([(short, approach("base", 20)), (approach("base", 20), short), (approach("other", 20), approach("base", 20))])
    assert [pair.found.num_rows for pair in pairs] == [20, 20, 40]
    assert (pairs[0].found.difference.value, pairs[1].found.difference.value) == (0.6, -0.6)
    # two tests, not three: a pair and its mirror image are one
    assert pairs[0].adjusted_p == pairs[1].adjusted_p == pytest.approx(2 * pairs[0].found.p_value)


def test_after_the_facts_changed_the_verdict_says_who_still_knows() -> None:
    stale = approach("tuned", 90, is_trained=True, changed=share_figure((np.arange(ROWS) < ROWS / 10).astype(float)).interval)
    text = " ".join(judge([approach("base", 20), stale], "exact_match", ROWS).sentences)
    assert "After the facts changed, without training again, exact_match: tuned 0.9 -> 0.1." in text


# ---- the file ---------------------------------------------------------------------------------------------------------------

GOOD = """version: 1
name: c
base: builtin:tiny
task: {name: t, kind: generation, source: {kind: builtin, name: orders, split: test}, metrics: [{kind: exact-match}]}
train: [{source: {kind: builtin, name: orders}}]
approaches:
  - {kind: prompting}
  - {kind: few-shot}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: few-shot", "kind: few-shots", "unknown kind `few-shots`"),
        ("kind: few-shot", "kind: prompting", "`prompting` is the name of approaches.0, too"),
        ("{kind: few-shot}", "{kind: few-shot, counts: 3}", "did you mean `count`?"),
        ("  - {kind: few-shot}\n", "", "approaches"),
        ("name: t, kind: generation", "name: t, kind: language-modelling", "asks no question"),
        ("name: t,", "name: t, retrieve: {source: {kind: builtin, name: orders}},", "would be part of every approach"),
        (
            "{kind: few-shot}",
            "{kind: retrieval, retrieve: {source: {kind: builtin, name: orders}, prompt: 'x {question}'}}",
            "`{passages}` is missing",
        ),
        (
            "{kind: few-shot}",
            "{kind: prompting, name: b, variants: {prompts: [{name: a}, {name: b, prompt: 'x'}]}}",
            "`{question}` is missing",
        ),
    ],
)
def test_a_wrong_comparison_names_the_place(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(GOOD)
    load_comparison(path)
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_comparison(path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("compare-*.yaml")), ids=lambda path: path.name)
def test_every_comparison_that_comes_with_ftcli_loads(path: Path) -> None:
    comparison, text = load_comparison(path)
    assert comparison.name == path.stem
    assert text == path.read_text()


# ---- the page ---------------------------------------------------------------------------------------------------------------


def outcome() -> dict[str, Any]:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6, "higher_is_better": True}
    pair = {"difference": {"value": 0.3, "low": 0.2, "high": 0.4}, "adjusted_p": 0.01, "only_a": 3, "only_b": 0, "minimum_detectable": 0.1}
    one = {
        "name": "<base>",
        "kind": "prompting",
        "what": "the base | as it is",
        "figures": {"exact_match": figure},
        "against_first": pair,
        "prompt_tokens": 50.2,
        "answer_tokens": 20.0,
        "seconds_a_request": 0.05,
        "training": {"seconds": 12.0, "steps": 5, "tokens": 1200},
        "extra_bytes": 2048,
        "when_facts_change": "edit & go",
        "changed": figure,
        "variants": {"chosen": "a", "figure": "exact_match", "validation_rows": 9, "table": [{"name": "a", **figure, "p_value": None}]},
    }
    retained = {"approach": "x", "task": "s", "figure": "bits_per_byte", "before": figure, "after": figure, "p_value": 0.5}
    sample = {
        "where": "r:1",
        "prompt": "<script>alert(1)</script>",
        "reference": "r",
        "answers": [{"approach": "x", "answer": "a", "value": 1.0}],
    }
    return {
        "name": "c",
        "base": "builtin:tiny",
        "task": "orders",
        "figure": "exact_match",
        "higher_is_better": True,
        "rows": 9,
        "precision": "float32",
        "verdict": {"finding": "form", "sentences": ["One sentence.", "Best <b>."]},
        "approaches": [one, {**one, "name": "plain", "training": None, "against_first": None, "seconds_a_request": None, "changed": None}],
        "pairs": [{"first": "a", "second": "b", **pair}],
        "retained": [retained],
        "samples": [sample],
    }


class Balance(HTMLParser):
    """Counts tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """A rect of a drawing ends at once."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_fetches_nothing_and_escapes_what_it_shows() -> None:
    text = html_page(document(outcome()))
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert parser.links == []
    assert "<script>" not in text
    assert "&lt;base&gt;" in text


def test_table_markdown_and_terminal_say_the_same() -> None:
    rows = table_of(outcome())
    assert rows[1] == (
        "<base>",
        "the base | as it is",
        "0.5 (0.4 to 0.6)",
        "+0.3 (p 0.01)",
        "50 + 20",
        "50 ms",
        "12.0 s, 5 steps, 1.2k tokens",
        "2.0 KiB",
    )
    text = markdown_text(document(outcome()))
    assert "One sentence." in text
    assert "12.0 s, 5 steps, 1.2k tokens" in text
    assert "the base \\| as it is" in text
    shown = "\n".join(terminal_lines(outcome()))
    assert "0.5 (0.4 to 0.6)" in shown
    assert "edit & go; measured then: 0.5 (0.4 to 0.6)" in shown
    assert shown.endswith("One sentence.\nBest <b>.")
