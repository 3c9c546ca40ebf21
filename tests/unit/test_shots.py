"""Solved examples: the right number, never the question itself, the same every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ftcli.errors import DataError
from ftcli.evaluation.tasks.questions import question_key
from ftcli.evaluation.tasks.shots import Bm25, Examples, Questions, Shots, before_each
from ftcli.evaluation.tasks.variants import RowList

CHOICES = ["fixed", "first", "random", "nearest", "embedding"]
PROMPTS = [f"question {word}" for word in ("red", "green", "blue", "yellow", "red apple")]
SOLVED = [f"{prompt} = {number}" for number, prompt in enumerate(PROMPTS)]
OWN = Questions([f"own:{number}" for number in range(1, 6)], PROMPTS, SOLVED)


def embed(texts: Sequence[str]) -> np.ndarray:
    """Vectors that tell texts apart by how often the letter e stands in them."""
    turns = np.array([text.count("e") for text in texts]) / 5
    return np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)


def shown(**settings) -> list[str]:
    return before_each(Shots(**settings), OWN, lambda rows: OWN, embed).texts


def from_others(asked: Questions, others: list[str], **settings) -> Examples:
    """The examples of `asked` out of another source, whose answers are named for their places."""
    rows = RowList([(f"other:{place}", {"question": text}) for place, text in enumerate(others, 1)], "others")
    pool = Questions([where for where, _ in rows.listed], others, [f"{text} = o{place}" for place, text in enumerate(others, 1)])
    return before_each(Shots(**settings).model_copy(update={"source": rows}), asked, lambda listed: pool, embed)


@pytest.mark.parametrize("choose", CHOICES)
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


def test_more_examples_than_there_are_is_an_error() -> None:
    with pytest.raises(DataError, match="there are 4 to choose from"):
        shown(count=5)


@pytest.mark.parametrize("choose", CHOICES)
def test_an_example_of_another_source_that_asks_the_question_is_passed_over(choose: str) -> None:
    others = ["Question RED?", "question  green", "question black", "question white", "question red apple"]
    found = from_others(OWN, others, count=2, choose=choose)
    assert all(text.count("=") == 2 for text in found.texts)
    for prompt, text in zip(PROMPTS, found.texts, strict=True):
        shown = [line.split(" = ")[0] for line in text.strip().split("\n\n")]
        assert question_key(prompt) not in map(question_key, shown)
    (note,) = found.notes
    assert note.startswith("3 of 5 rows are asked in the examples of `others`, too (own:1, own:2, own:5): ")


@pytest.mark.parametrize("choose", CHOICES)
def test_a_row_that_is_there_twice_is_no_example_of_its_twin(choose: str) -> None:
    prompts = [*PROMPTS, "Question, red"]
    own = Questions([f"own:{n}" for n in range(1, 7)], prompts, [f"{prompt} = {n}" for n, prompt in enumerate(prompts)])
    found = before_each(Shots(count=3, choose=choose), own, lambda rows: own, embed)
    for place, other in ((0, 5), (5, 0)):
        assert f"= {other}\n" not in found.texts[place]
        assert found.texts[place].count("=") == 3
    assert found.notes == ["2 of 6 rows ask what another row asks (own:1, own:6): no row was shown an example of its own question"]
    assert before_each(Shots(count=3, choose=choose), OWN, lambda rows: OWN, embed).notes == []


def test_the_next_nearest_takes_the_place_of_the_question_itself() -> None:
    found = from_others(
        Questions(["own:1"], ["question red"], [""]), ["question red apple", "question red", "other"], count=1, choose="nearest"
    )
    assert found.texts == ["question red apple = o1\n\n"]


def test_a_question_is_known_behind_its_passages() -> None:
    asked = Questions(["own:1"], ["A red book about it.\n\nquestion red"], [""], ["question red"])
    found = from_others(asked, ["question red", "question black"], count=1, choose="nearest")
    assert found.texts == ["question black = o2\n\n"]


def test_too_few_examples_that_ask_something_else_is_an_error() -> None:
    with pytest.raises(DataError, match="2 examples are asked for, and there are 1 that ask something else to choose from"):
        from_others(OWN, ["question red", "black"], count=2)


def test_a_question_is_known_by_its_words_and_signs() -> None:
    assert question_key("  What is\tRED? ") == question_key("what is red") != question_key("what is reddish")
    assert len({question_key(text) for text in ("3 + 4", "3 - 4", "3 * 4", "3 4", "-3 4", "3 4 >", "C", "C++")}) == 8
    assert question_key("well-known") == question_key("Well known")
    assert question_key("?!") != question_key("...")


def test_bm25_prefers_rare_words_and_short_texts() -> None:
    index = Bm25(["the the the cat", "the dog", "the zebra", "a long text about many things and the zebra among them"])
    assert index.nearest("the zebra", 4)[:2] == [2, 3]
    assert index.nearest("nothing known", 2) == [0, 1]
