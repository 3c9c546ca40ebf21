"""Planted repeats are found, of every kind, with their places; what is merely similar is left alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ftcli.data.leakage import Text, find_leakage, read_text

WORDS = [
    *("river", "stone", "amber", "lantern", "quiet", "market", "copper", "window", "garden", "thunder", "velvet", "harbour"),
    *("winter", "letter", "engine", "meadow", "silver", "candle", "forest", "orange", "mirror", "bridge", "rocket", "pepper"),
    *("island", "violin", "tunnel", "anchor", "basket", "marble", "cotton", "desert", "falcon", "ginger", "hammer", "jungle"),
]


def sentences(count: int, seed: int, words: int = 12) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choice(WORDS) + str(generator.randrange(100)) for _ in range(words)) for _ in range(count)]


def texts(lines: list[str], name: str) -> list[Text]:
    return [Text(f"{name}:{number}", line, "") for number, line in enumerate(lines, 1)]


def one_word_changed(line: str) -> str:
    words = line.split()
    words[len(words) // 2] = "elsewhere"
    return " ".join(words)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda line: line, "exact"),
        (str.upper, "same-words"),
        (lambda line: "  " + line.replace(" ", "\n  ") + "!", "same-words"),
        (one_word_changed, "near"),
        (lambda line: f"somebody wrote to us yesterday and said {line} and then left without a word", "quoted"),
    ],
    ids=["exact", "re-cased", "re-spaced", "one word changed", "quoted in a longer text"],
)
def test_planted_rows_are_found_with_their_places_and_nothing_else_is(change, kind: str) -> None:
    held_out = sentences(60, seed=1)
    planted = [change(line) for line in held_out[:20]]
    found = find_leakage(texts(sentences(200, seed=2) + planted, "train"), texts(held_out, "test"))
    assert {(hit.where, hit.other) for hit in found.leaked} == {(f"test:{n}", f"train:{200 + n}") for n in range(1, 21)}
    assert found.counts(found.leaked) == {kind: 20}


def test_disjoint_texts_have_nothing_in_common() -> None:
    found = find_leakage(texts(sentences(100, seed=3), "train"), texts(sentences(100, seed=4), "test"))
    assert (found.leaked, found.repeated, found.repeated_evaluation, found.conflicts) == ([], [], [], [])


def test_repeats_name_the_earlier_row() -> None:
    lines = sentences(5, seed=5)
    found = find_leakage(texts([*lines, lines[1], lines[2].upper()], "train"), [])
    assert [(hit.where, hit.other, hit.kind) for hit in found.repeated] == [
        ("train:6", "train:2", "exact"),
        ("train:7", "train:3", "same-words"),
    ]


def test_the_same_question_with_another_answer_is_a_conflict_and_with_the_same_is_none() -> None:
    rows = [
        Text("a:1", "Where is my card?", "arrival"),
        Text("a:2", "where is my CARD", "Arrival"),
        Text("a:3", "Where is my card", "limits"),
    ]
    assert [(hit.where, hit.other) for hit in find_leakage(rows, []).conflicts] == [("a:3", "a:1")]


def test_short_and_empty_rows_leak_only_when_equal() -> None:
    train = [Text("t:1", "yes", ""), Text("t:2", "", ""), Text("t:3", "a yes or a no is enough for me", "")]
    found = find_leakage(train, [Text("e:1", "Yes!", ""), Text("e:2", "", ""), Text("e:3", "no", "")])
    assert [(hit.where, hit.kind) for hit in found.leaked] == [("e:1", "same-words")]


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"text": "only this"}, "only this", ""),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=", "4"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, "hi", "yo"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
            "text\na",
            "b",
        ),
    ],
)
def test_question_and_answer_of_a_row(row: dict, question: str, answer: str) -> None:
    assert read_text(row, "x:1") == Text("x:1", question, answer)


@pytest.mark.real
def test_leaks_planted_across_splits_of_real_rows_are_found(shared: Path) -> None:
    lines = (shared / "data" / "banking77_train.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["text"] for line in lines]
    random.Random(0).shuffle(questions)
    train, held_out = texts(questions[:2000], "train"), texts(questions[2000:2600], "test")
    known = {hit.where for hit in find_leakage(train, held_out).leaked}
    clean = [text for text in held_out if text.where not in known and len(text.words) >= 8][:150]
    for change, recall in (
        (str.upper, 1.0),
        (lambda line: f"Dear all, I ask you this: {line} Thanks for any help with it", 1.0),
        (one_word_changed, 0.95),
    ):
        planted = [Text(f"planted:{number}", change(text.question), "") for number, text in enumerate(clean)]
        found = {hit.where: hit.other for hit in find_leakage([*train, *planted], held_out).leaked}
        right = sum(found.get(text.where) == f"planted:{number}" for number, text in enumerate(clean))
        assert right >= recall * len(clean)
        assert len(set(found) - known - {text.where for text in clean}) <= 0.05 * len(held_out)
