"""Metrics: scores a reader can check in the head."""

from __future__ import annotations

import random
import re
import string
import sys
from typing import Any, get_args

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from rouge_score import rouge_scorer

from ftcli.errors import MissingExtraError
from ftcli.evaluation.statistics import bootstrap_counts
from ftcli.metrics import Metric, bleu, rouge
from ftcli.metrics.bleu import Bleu
from ftcli.metrics.chrf import Chrf
from ftcli.metrics.exact_match import ExactMatch
from ftcli.metrics.json_match import JsonMatch
from ftcli.metrics.json_valid import JsonValid
from ftcli.metrics.metric import RowMetric, without_doubles
from ftcli.metrics.normalise import SQUAD, normalised
from ftcli.metrics.number_match import NumberMatch
from ftcli.metrics.regex_match import RegexMatch
from ftcli.metrics.rouge import Rouge
from ftcli.metrics.token_f1 import TokenF1

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
        (NumberMatch(), "it is \N{MINUS SIGN}5", "-5", 1),
        (NumberMatch(), "it is \N{MINUS SIGN}5", "5", 0),
        (NumberMatch(), "10\N{MINUS SIGN}5", "5", 1),
        (NumberMatch(), "1e\N{MINUS SIGN}3", "0.001", 1),
        (NumberMatch(), "\N{EN DASH}5", "5", 1),
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


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        (ExactMatch(normalise=("punctuation", "spaces")), "a,  b", "a b", 1),
        (ExactMatch(normalise=("articles", "spaces")), "The cat", "cat", 1),
        (ExactMatch(normalise=("articles",)), "Them", "m", 0),
        (ExactMatch(normalise=("articles",)), "the cat", "cat", 1),
        (ExactMatch(normalise=("articles",)), "saw the cat", "saw cat", 1),
        (ExactMatch(normalise=("articles",)), "saw a the cat", "saw cat", 1),
        (ExactMatch(normalise=("articles",)), "saw  cat", "saw cat", 0),
        (ExactMatch(normalise=("articles",), strip=False), "cat the", "cat", 1),
        (ExactMatch(normalise=("articles",), strip=False), "the cat ", "cat", 0),
        (ExactMatch(normalise=("case", "articles")), "The cat", "cat", 1),
        (ExactMatch(normalise=("punctuation",)), "cat !", "cat", 1),
        (ExactMatch(normalise=("punctuation",)), "a , - b", "a b", 1),
        (ExactMatch(normalise=("punctuation",)), "a, b.", "a b", 1),
        (ExactMatch(normalise=("punctuation",)), "a,b", "a b", 0),
        (ExactMatch(normalise=("case",)), " Cat", "cat", 1),
        (ExactMatch(normalise=("spaces",)), "a \n b", "a b", 1),
        (TokenF1(), "the cat sat", "A cat sat!", 1),
        (TokenF1(), "cat cat", "cat", 2 / 3),  # precision 1/2, recall 1
        (TokenF1(), "cat dog", "cat", 2 / 3),
        (TokenF1(), "dog", "cat", 0),
        (TokenF1(), "", "", 1),
        (TokenF1(), "the", "a", 1),  # nothing is left of either
        (TokenF1(), "", "cat", 0),
        (TokenF1(normalise=()), "Cat", "cat", 0),
        (RegexMatch(), "I think. The answer is: Paris.\nBye", "paris", 1),
        (RegexMatch(), "Answer: 3\nNo. Answer: 4", "Answer: 4", 1),
        (RegexMatch(), "Paris", "Paris", 0),
        (RegexMatch(pattern=r"\d+"), "from 3 to 12", "12", 1),
        (RegexMatch(pattern=r"(\d+)-(\d+)"), "3-12", "3", 1),
        (RegexMatch(pattern=r"(x)|(\d)"), "7", "7", 1),
        (RegexMatch(pattern=r".*", normalise=()), "A", "a", 0),
        (JsonValid(), ' {"a": [1]} ', "whatever", 1),
        (JsonValid(), '{"a": 1} and more', "", 0),
    ],
)
def test_words_patterns_and_json(metric: RowMetric, answer: str, reference: str, score: float) -> None:
    assert metric.score(answer, reference) == pytest.approx(score)


def test_of_several_references_the_best_counts() -> None:
    assert ExactMatch().best("b", ["a", "b"]) == 1
    assert ExactMatch().over(["b", "c"], [["a", "b"], ["d"]]) == 0.5


ANSWERS = [
    "The cat sat on the mat.",
    "a dog barked at 3 of the postmen, loudly",
    "",
    "It is raining today",
    "yes",
    "Les élèves étudient (beaucoup)",
    "in the end , all went well again",
]
REFERENCES = [
    ["The cat sat on the mat.", "A cat was on the mat"],
    ["A dog barked at three postmen loudly", "a dog barked at 3 postmen"],
    ["not empty", "nothing"],
    ["It rains today", "It is raining"],
    ["yes indeed it is so", "yes"],
    ["Les élèves étudient beaucoup", "Les enfants travaillent"],
    ["in the end all went well", "at the end, all went well again"],
]


@pytest.mark.parametrize("settings", [{}, {"tokenize": "intl"}, {"tokenize": "char", "lowercase": True}, {"tokenize": "zh"}])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 1), slice(2, 3), slice(3, 5)])
def test_bleu_is_sacrebleu_s(settings: dict[str, Any], rows: slice) -> None:
    columns = [[references[place] for references in REFERENCES[rows]] for place in range(2)]
    expected = sacrebleu.BLEU(**settings).corpus_score(ANSWERS[rows], columns).score / 100
    assert Bleu(**settings).over(ANSWERS[rows], REFERENCES[rows]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("settings", [{}, {"word_order": 2}, {"lowercase": True}])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 1), slice(2, 3), slice(3, 5)])
def test_chrf_is_sacrebleu_s(settings: dict[str, Any], rows: slice) -> None:
    columns = [[references[place] for references in REFERENCES[rows]] for place in range(2)]
    expected = sacrebleu.CHRF(**settings).corpus_score(ANSWERS[rows], columns).score / 100
    assert Chrf(**settings).over(ANSWERS[rows], REFERENCES[rows]) == pytest.approx(expected, abs=1e-12)


def test_bleu_of_a_set_is_not_the_mean_of_its_rows() -> None:
    whole = Bleu().over(ANSWERS, REFERENCES)
    assert abs(whole - sum(map(Bleu().best, ANSWERS, REFERENCES)) / len(ANSWERS)) > 0.01


@pytest.mark.parametrize("variant", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_is_rouge_score_s_and_of_several_references_the_best(variant: Any, stemmer: bool) -> None:
    metric, scorer = Rouge(variant=variant, stemmer=stemmer), rouge_scorer.RougeScorer([variant], use_stemmer=stemmer)
    for answer, references in zip(ANSWERS, REFERENCES, strict=True):
        expected = scorer.score_multi(references, answer)[variant].fmeasure
        assert metric.best(answer, references) == pytest.approx(expected)


def test_a_corpus_score_has_an_interval_and_rows_that_pull() -> None:
    metric = Bleu()
    counts = np.array([metric.counts(*row) for row in zip(ANSWERS * 6, REFERENCES * 6, strict=True)])
    interval, pulls = bootstrap_counts(counts, metric.of_counts)
    assert interval.low < interval.value < interval.high
    assert interval.value == pytest.approx(metric.over(ANSWERS * 6, REFERENCES * 6))
    assert pulls.mean() == pytest.approx(interval.value)
    assert pulls[0] > interval.value > pulls[1]  # the first row is right
    folded, pulled = bootstrap_counts(counts[:7], metric.of_counts, repeats=np.full(7, 6))
    assert folded.value == pytest.approx(interval.value)
    assert (folded.low, folded.high) == pytest.approx((interval.low, interval.high), abs=0.02)
    assert pulled == pytest.approx(pulls[:7])


@pytest.mark.parametrize(("settings", "package"), [({"kind": "bleu"}, "sacrebleu"), ({"kind": "rouge"}, "rouge_score")])
def test_a_missing_library_is_named_by_its_extra(settings: dict[str, str], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{package}.metrics.bleu" if package == "sacrebleu" else f"{package}.rouge_scorer", None)
    bleu._scorer.cache_clear()
    rouge._scorer.cache_clear()
    metric = TypeAdapter(Metric).validate_python(settings)
    with pytest.raises(MissingExtraError, match=r"ftcli\[metrics\]"):
        metric.score("a", "b")


def test_a_pattern_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ValidationError, match="allowed: a regular expression"):
        RegexMatch(pattern="(")


def test_two_metrics_of_one_name_are_refused() -> None:
    assert without_doubles((Rouge(), Rouge(variant="rouge1")))
    with pytest.raises(ValueError, match="`exact-match` twice"):
        without_doubles((ExactMatch(), ExactMatch(ignore_case=True)))


def test_all_normalisers_together_are_those_of_squad() -> None:
    """Against the four steps as they stand in the paper's evaluation, each over the whole text."""
    draw = random.Random(0)
    pieces = ["a", "the", "An", "cat", " ", "  ", "\n", ",", ".", "-", "\N{LEFT DOUBLE QUOTATION MARK}", "_", "é", "5", " the ", "'s"]
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=8))
        plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        assert normalised(text, SQUAD) == " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())
