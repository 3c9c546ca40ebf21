"""Solved examples: the right number, never the question itself, the same every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ftcli.errors import DataError
from ftcli.evaluation.tasks.shots import Bm25, Shots, before_each

PROMPTS = [f"question {word}" for word in ("red", "green", "blue", "yellow", "red apple")]
SOLVED = [f"{prompt} = {number}" for number, prompt in enumerate(PROMPTS)]


def embed(texts: Sequence[str]) -> np.ndarray:
    """Vectors that tell texts apart by how often the letter e stands in them."""
    turns = np.array([text.count("e") for text in texts]) / 5
    return np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)


def shown(**settings) -> list[str]:
    return before_each(Shots(**settings), PROMPTS, SOLVED, lambda rows: ([], []), embed)


@pytest.mark.parametrize("choose", ["fixed", "first", "random", "nearest", "embedding"])
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


def test_examples_can_be_chosen_by_the_vectors_of_the_questions() -> None:
    # "question green" has three e; of the others "question red apple" has three, and "question red" and "question blue" have two
    assert shown(count=2, choose="embedding")[1] == "question red = 0\n\nquestion red apple = 4\n\n"
    with pytest.raises(DataError, match="not for this kind of task"):
        before_each(Shots(count=1, choose="embedding"), PROMPTS, SOLVED, lambda rows: ([], []))


def test_more_examples_than_there_are_is_an_error() -> None:
    with pytest.raises(DataError, match="there are 4 to choose from"):
        shown(count=5)


def test_bm25_prefers_rare_words_and_short_texts() -> None:
    index = Bm25(["the the the cat", "the dog", "the zebra", "a long text about many things and the zebra among them"])
    assert index.nearest("the zebra", 4)[:2] == [2, 3]
    assert index.nearest("nothing known", 2) == [0, 1]
