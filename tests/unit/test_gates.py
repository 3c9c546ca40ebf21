"""Gates: what they read, when they fail, and what a CI system sees."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from ftcli.errors import UsageError
from ftcli.evaluation.gates import Measured, judge, junit_xml, parse_gate

RESULTS = {"orders": {"exact-match": Measured(0.9, np.array([1.0] * 9 + [0.0]))}, "stories": {"bits_per_byte": Measured(1.02)}}
BASE = {"orders": {"exact-match": Measured(0.5, np.array([1.0, 0.0] * 5))}, "stories": {"bits_per_byte": Measured(1.0)}}


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("orders.exact_match >= 0.9", True),
        ("orders.exact-match > 0.9", False),
        ("orders.exact_match>=base+.4", True),
        ("orders.exact_match >= base + 0.41", False),
        ("stories.bits_per_byte <= base + 0.02", True),
        ("stories.bits_per_byte <= base * 1.01", False),
        ("stories.bits_per_byte < base - 0.1", False),
        ("stories.bits_per_byte <= 1.1e0", True),
    ],
)
def test_a_gate_compares_a_figure_with_its_bound(text: str, passed: bool) -> None:
    assert judge(parse_gate(text), RESULTS, BASE).passed is passed


def test_a_level_lets_pass_what_chance_can_explain_and_nothing_else() -> None:
    few = {"t": {"acc": Measured(0.75, np.array([1.0, 1.0, 1.0, 0.0]))}}
    many = {"t": {"acc": Measured(0.75, np.array([1.0, 1.0, 1.0, 0.0] * 100))}}
    gate = parse_gate("t.acc >= 0.9 @ p<0.05")
    assert judge(gate, few, None).passed
    assert not judge(gate, many, None).passed
    assert not judge(parse_gate("t.acc >= 0.9"), few, None).passed


def test_a_level_against_the_base_is_paired() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(5, 3, 50)
    worse = base + generator.normal(0.3, 0.1, 50)
    gate = parse_gate("t.loss <= base + 0.05 @ p<0.01")
    found = judge(gate, {"t": {"loss": Measured(float(worse.mean()), worse)}}, {"t": {"loss": Measured(float(base.mean()), base)}})
    assert not found.passed
    assert found.p_value is not None
    assert found.p_value < 0.01


def test_a_figure_that_is_not_a_number_fails() -> None:
    assert not judge(parse_gate("t.loss <= 2"), {"t": {"loss": Measured(math.nan)}}, None).passed


@pytest.mark.parametrize(
    "text", ["orders >= 0.9", "orders.exact_match = 0.9", "orders.exact_match >= bass", "", "a.b >= 1 @ p<2", "a.b >= 1 @ 0.05"]
)
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="a gate cannot be read"):
        parse_gate(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("order.exact_match >= 1", "task `order` was not measured"),
        ("orders.exact_mach >= 1", "`exact_mach` was not measured"),
        ("stories.bits_per_byte <= 1 @ p<0.05", "no mean over rows"),
    ],
)
def test_a_gate_of_nothing_measured_is_an_error_and_not_a_pass(text: str, message: str) -> None:
    with pytest.raises(UsageError, match="cannot be judged") as caught:
        judge(parse_gate(text), RESULTS, BASE)
    assert message in str(caught.value)


def test_the_base_must_be_there() -> None:
    with pytest.raises(UsageError, match="needs the base"):
        judge(parse_gate("stories.bits_per_byte <= base"), RESULTS, None)


def test_junit_names_the_gates_that_failed() -> None:
    results = [judge(parse_gate(text), RESULTS, BASE) for text in ("orders.exact_match >= 0.95", "stories.bits_per_byte <= base + 0.5")]
    suite = ElementTree.fromstring(junit_xml(results, "ftcli eval")).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failures = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    assert failures == ["orders.exact_match >= 0.95"]


def test_a_level_tests_the_weighted_figure_that_is_held_against_the_bound() -> None:
    sizes = np.array([1000.0] + [10.0] * 30)
    base, tuned = np.full(31, 2.0), np.array([1.5] + [2.4] * 30)
    values = [float(np.average(one, weights=sizes)) for one in (tuned, base)]
    assert values[0] < values[1]
    found = judge(
        parse_gate("t.bits <= base - 0.4 @ p<0.05"),
        {"t": {"bits": Measured(values[0], tuned, sizes)}},
        {"t": {"bits": Measured(values[1], base, sizes)}},
    )
    # The mean over rows, each alike, would be far above the bound, and its p near 0.
    assert found.p_value is not None
    assert found.p_value > 0.05
    assert found.passed
    alone = judge(parse_gate("t.bits <= 1.9 @ p<0.05"), {"t": {"bits": Measured(values[0], tuned, sizes)}}, None)
    assert alone.passed
    few = judge(parse_gate("t.bits <= 1.5 @ p<0.05"), {"t": {"bits": Measured(2.0, np.full(31, 2.0), sizes)}}, None)
    assert not few.passed


def test_a_level_against_a_base_with_other_rows_is_an_error() -> None:
    two, three = ({"t": {"acc": Measured(0.5, np.full(count, 0.5))}} for count in (2, 3))
    with pytest.raises(UsageError, match="cannot be judged"):
        judge(parse_gate("t.acc >= base + 1 @ p<0.05"), two, three)
