"""Metrics: scores a reader can check in the head."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftcli.metrics import Metric
from ftcli.metrics.exact_match import ExactMatch
from ftcli.metrics.json_match import JsonMatch
from ftcli.metrics.number_match import NumberMatch

KINDS = get_args(get_args(Metric)[0])


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        (ExactMatch(), " yes\n", "yes", 1),
        (ExactMatch(strip=False), " yes\n", "yes", 0),
        (ExactMatch(), "Yes", "yes", 0),
        (ExactMatch(ignore_case=True), "STRASSE", "straße", 1),
        (ExactMatch(), "", "", 1),
        (ExactMatch(), "a  b", "a b", 0),
    ],
)
def test_exact_match(metric: ExactMatch, answer: str, reference: str, score: float) -> None:
    assert metric.score(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score", "by_field"),
    [
        ('{"a": 1, "b": [2, 3]}', '{ "b":[2,3], "a":1 }', 1, 1),
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', 0, 1 / 3),  # leaves: a=1, b=2, b=3
        ('{"a": 1}', '{"a": 1, "b": 3}', 0, 1 / 2),
        ('{"a": 1.0}', '{"a": 1}', 1, 1),
        ('{"a": true}', '{"a": 1}', 0, 0),
        ('{"a": "1"}', '{"a": 1}', 0, 0),
        ('{"a": null}', '{"a": {}}', 0, 0),
        ('{"a": []}', '{"a": {}}', 0, 0),
        ("[1, 2]", "[2, 1]", 0, 0),
        ("[]", "[]", 1, 1),
        ("3", "3", 1, 1),
        ('{"a": 1', '{"a": 1}', 0, 0),
        ('Sure: {"a": 1}', '{"a": 1}', 0, 0),
        ("", "{}", 0, 0),
        ("NaN", "NaN", 0, 0),
        ("[" * 100_000, "[]", 0, 0),
        ("9" * 5000, "9", 0, 0),
    ],
)
def test_json_match(answer: str, reference: str, score: float, by_field: float) -> None:
    assert JsonMatch().score(answer, reference) == score
    assert JsonMatch(by_field=True).score(answer, reference) == pytest.approx(by_field)


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        (NumberMatch(), "3 apples and 4 pears make 7.", "7", 1),
        (NumberMatch(), "It is 7, not 8", "7", 0),
        (NumberMatch(), "$1,200", "1200.00", 1),
        (NumberMatch(), "1,2", "2", 1),
        (NumberMatch(), "1,2345", "2345", 1),
        (NumberMatch(), "10-5", "5", 1),
        (NumberMatch(), "it is -5", "-5", 1),
        (NumberMatch(), "(-.5)", "-0.5", 1),
        (NumberMatch(), "1.5e3", "1500", 1),
        (NumberMatch(), "1e99999999999", "1", 0),
        (NumberMatch(), "no number", "7", 0),
        (NumberMatch(), "", "", 0),
        (NumberMatch(), "18.", "18", 1),
        (NumberMatch(marker="####"), "3 * 6 = 18 #### 18 (of 20)", "so\n#### 18", 1),
        (NumberMatch(marker="####"), "#### 1 #### 18", "18", 1),
        (NumberMatch(marker="####"), "18 ####", "18", 0),
        (NumberMatch(tolerance=0.01), "3.14", "3.15", 1),
        (NumberMatch(tolerance=0.01), "3.14", "3.151", 0),
        (NumberMatch(), "0.1", "0.10000000000000001", 0),
    ],
)
def test_number_match(metric: NumberMatch, answer: str, reference: str, score: float) -> None:
    assert metric.score(answer, reference) == score


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(answer=st.text(), reference=st.text())
def test_every_score_is_between_0_and_1_and_no_text_breaks_it(kind: Any, answer: str, reference: str) -> None:
    assert 0.0 <= kind().score(answer, reference) <= 1.0
