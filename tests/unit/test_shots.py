"""Solved examples: the right number, never the question itself, the same every time."""

from __future__ import annotations

import pytest

from ftcli.errors import DataError
from ftcli.evaluation.tasks.shots import Bm25, Shots, before_each

PROMPTS = [f"question {word}" for word in ("red", "green", "blue", "yellow", "red apple")]
SOLVED = [f"{prompt} = {number}" for number, prompt in enumerate(PROMPTS)]


def shown(**settings) -> list[str]:
    return before_each(Shots(**settings), PROMPTS, SOLVED, lambda rows: ([], []))


@pytest.mark.parametrize("choose", ["fixed", "first", "random", "nearest"])
@pytest.mark.parametrize("count", [1, 4])
def test_so_many_examples_and_never_the_question_itself(choose: str, count: int) -> None:
    found = shown(count=count, choose=choose)
    assert all(text.count("=") == count for text in found)
    assert all(solved + "\n" not in text for solved, text in zip(SOLVED, found, strict=True))
    assert found == shown(count=count, choose=choose)


def test_fixed_examples_are_the_same_for_all_other_questions() -> None:
    assert len(set(shown(count=2, choose="fixed"))) <= 3
    assert len(set(shown(count=2, choose="random"))) > 3
    assert shown(count=2, choose="random", seed=1) != shown(count=2, choose="random", seed=2)


def test_the_nearest_example_stands_last() -> None:
    assert shown(count=2, choose="nearest")[4].endswith("question red = 0\n\n")


def test_more_examples_than_there_are_is_an_error() -> None:
    with pytest.raises(DataError, match="there are 4 to choose from"):
        shown(count=5)


def test_bm25_prefers_rare_words_and_short_texts() -> None:
    index = Bm25(["the the the cat", "the dog", "the zebra", "a long text about many things and the zebra among them"])
    assert index.nearest("the zebra", 4)[:2] == [2, 3]
    assert index.nearest("nothing known", 2) == [0, 1]
