"""What stands around a task: passages, ways to ask, groups of rows, and the rows that are clean."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from ftcli.data.sources.file import File
from ftcli.errors import DataError
from ftcli.evaluation.measurement import check_task, measure_task, posed
from ftcli.evaluation.statistics import wilson
from ftcli.evaluation.tasks.retrieve import Retrieve, num_tokens, shortened
from ftcli.evaluation.tasks.retrieve_index import Bm25, Passage, cut_passages, index_passages
from ftcli.evaluation.tasks.task import Figure, LeakageCheck, Subject, TaskResult, TaskSettings, share_figure
from ftcli.evaluation.tasks.variants import RowList, Variant, Variants, asked, question_column, question_of_row
from ftcli.models.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("builtin:tiny")
CHAT = {
    "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
}


def write(path: Path, rows: list[dict[str, Any]]) -> File:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return File(path=str(path))


@dataclass
class Config:
    max_position_embeddings: int = 128

    def get_text_config(self) -> Config:
        return self


@dataclass
class Model:
    """As much of a model as the length of its context."""

    config: Config = field(default_factory=Config)

    @property
    def module(self) -> Model:
        return self

    def modules(self) -> list[Any]:
        return []


class Says(TaskSettings):
    """A task that is right where the question holds the word `please`."""

    kind: Literal["says"] = "says"
    main_figure: ClassVar[str] = "accuracy"

    def measure(self, subject: Subject) -> TaskResult:
        rows = [{"where": where, "question": row["question"]} for where, row in self.read_rows()]
        return TaskResult({"accuracy": share_figure(np.array([float("please" in str(row["question"])) for row in rows]))}, rows)

    def prompts(self, rows: Any, tokenizer: Any) -> list[str]:
        return [row["question"] for _, row in rows]


def subject() -> Subject:
    return Subject(Model(), TOKENIZER, 1000, lambda done, total: None)  # type: ignore[arg-type]


# ---- passages ---------------------------------------------------------------------------------------------------------------


def test_every_word_of_a_document_is_in_a_passage_and_the_overlap_is_as_asked() -> None:
    words = [f"w{number}" for number in range(25)]
    pieces = [piece.split() for piece in cut_passages(" ".join(words), 10, 3)]
    assert pieces == [words[0:10], words[7:17], words[14:24], words[21:25]]
    assert cut_passages("", 10, 3) == []
    assert cut_passages("one", 1, 0) == ["one"]


def test_a_kept_index_answers_as_the_one_that_was_built(tmp_path: Path) -> None:
    documents = [Passage(f"d:{place}", text) for place, text in enumerate(["red apple pie", "green pear", "blue \nplum é", "apple apple"])]
    built = index_passages(documents, 50, 0, None)
    kept = index_passages(documents, 50, 0, tmp_path / "kept")
    again = index_passages([], 50, 0, tmp_path / "kept")
    for query in ("apple", "a green plum", "É", "nothing here"):
        assert built.search(query, 4) == kept.search(query, 4) == again.search(query, 4)
    assert again.num_bytes > 0


def test_only_passages_that_share_a_word_are_found_and_one_that_holds_the_question_can_be_left_out() -> None:
    passages = index_passages([Passage("a", "What is red? An apple."), Passage("b", "A red car."), Passage("c", "Sky.")], 50, 0, None)
    assert [passage.where for passage in passages.search("what is red", 3)] == ["a", "b"]
    assert [passage.where for passage in passages.search("What is red?", 3, without="What is RED?")] == ["b"]


def test_an_index_of_nothing_finds_nothing() -> None:
    assert Bm25([]).nearest("a", 3) == []
    assert index_passages([], 10, 0, None).search("a", 3) == []


@pytest.mark.parametrize("room", [0, 1, 5, 1000])
def test_a_text_is_cut_to_whole_words_and_never_over_its_room(room: int) -> None:
    text = "Once upon a time there was a wonderful extraordinarily long sentence."
    cut = shortened(text, room, TOKENIZER)
    assert num_tokens(cut, TOKENIZER) <= room
    assert text.startswith(cut)
    assert cut == text or text[len(cut)] == " " or cut == ""


def test_passages_keep_to_their_budget_and_to_the_context(tmp_path: Path) -> None:
    source = write(
        tmp_path / "docs.jsonl", [{"text": f"The mill number {number} " + "stands by the river and " * 20} for number in range(5)]
    )
    rows = [("r:1", {"question": "Where is the mill number 3? please"}), ("r:2", {"question": "mill " * 60})]
    lengths = []
    for budget in (20, 60, 5000):
        task = Says(name="t", source=source, retrieve=Retrieve(source=source, count=3, budget_tokens=budget))
        assert task.retrieve is not None
        found = posed(task, None, rows, subject(), task.retrieve.open(None)).source.rows()
        texts = [row["question"] for _, row in found]
        assert all(num_tokens(text, TOKENIZER) <= 128 - 64 for text in texts[:1])
        assert texts[0].endswith("\n\nWhere is the mill number 3? please")
        assert texts[1] == rows[1][1]["question"]  # it fills the context alone: no passage
        lengths.append(num_tokens(texts[0].removesuffix(str(rows[0][1]["question"])), TOKENIZER))
    assert lengths[0] <= 20 + 4
    assert lengths[0] < lengths[1] <= lengths[2]


def test_the_budget_is_of_all_passages_together() -> None:
    settings = Retrieve(source=RowSource, count=5, budget_tokens=25)
    passages = [Passage("a", "The old mill stands by the river.")] * 5
    assert num_tokens(passages[0].text, TOKENIZER) < 12
    text = settings.question("who?", passages, TOKENIZER, lambda text: True)
    assert text.count("mill") >= 2
    assert num_tokens(text.removesuffix("who?"), TOKENIZER) <= 25 + num_tokens("\n\n", TOKENIZER)


def test_passages_stand_where_the_prompt_says_whatever_is_in_them() -> None:
    settings = Retrieve(source=RowSource, prompt="Notes: {passages}\nQ: {question}")
    text = settings.question("who?", [Passage("a", "{question} {passages}"), Passage("b", "second")], TOKENIZER, lambda text: True)
    assert text == "Notes: second\n\n{question} {passages}\nQ: who?"


RowSource = File(path="nowhere.jsonl")


PLAIN_AND_KIND = (Variant(name="plain"), Variant(name="kind", prompt="{question}, please"))

# ---- ways to ask ------------------------------------------------------------------------------------------------------------


def test_a_chat_and_a_column_can_be_asked_otherwise() -> None:
    assert question_column(CHAT, [], "r") == "messages"
    assert question_of_row(CHAT, "messages", "r") == "Who?"
    again = asked(CHAT, "messages", "Who then?", "Be brief.", "r")
    assert [message["content"] for message in again["messages"]] == ["Be brief.", "Who then?", "Me."]
    assert CHAT["messages"][1]["content"] == "Who?"
    sharegpt = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]}
    assert asked(sharegpt, "conversations", "Hm?", "S", "r")["conversations"][:2] == [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "Hm?"},
    ]
    assert asked({"prompt": "a", "completion": "b"}, "prompt", "c", "S", "r") == {"prompt": "S\n\nc", "completion": "b"}
    with pytest.raises(DataError, match="no column holds a question"):
        question_column({"text": 3}, [], "r")


def test_the_best_prompt_is_chosen_on_rows_that_are_not_measured(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": f"number {number}"} for number in range(40)])
    variants = Variants(prompts=(Variant(name="plain"), Variant(name="kind", prompt="{question}, please")))
    result = measure_task(Says(name="t", source=source, variants=variants), subject())
    found = result.details["variants"]
    assert (found["chosen"], found["validation_rows"], found["rows"]) == ("kind", 10, 30)
    assert [(row["name"], row["value"]) for row in found["table"]] == [("plain", 0.0), ("kind", 1.0)]
    assert found["table"][0]["p_value"] < 0.01
    assert result.figures["accuracy"].interval.value == 1.0
    assert len(result.rows) == 30
    division = variants.divide([(str(place), {}) for place in range(40)], [str(place) for place in range(40)])
    assert not {where for where, _ in division.validation} & {where for where, _ in division.measured}
    assert len(division.validation) + len(division.measured) == 40
    assert "chosen among 2 on 10" in result.notes[0]


def test_of_equal_prompts_the_first_is_taken_and_validation_rows_may_be_others(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": "a"}] * 5)
    other = write(tmp_path / "validation.jsonl", [{"question": "b"}] * 7)
    variants = Variants(prompts=(Variant(name="one"), Variant(name="two")), validation=other, limit=6)
    result = measure_task(Says(name="t", source=source, variants=variants), subject())
    assert result.details["variants"]["chosen"] == "one"
    assert (result.details["variants"]["validation_rows"], len(result.rows)) == (6, 5)


def test_rows_that_ask_the_same_are_on_one_side(tmp_path: Path) -> None:
    rows = [(str(place), {}) for place in range(40)]
    keys = [f"question {place % 8}" for place in range(40)]
    division = Variants(prompts=PLAIN_AND_KIND).divide(rows, keys)
    sides = [{keys[int(where)] for where, _ in side} for side in (division.validation, division.measured)]
    assert list(map(len, sides)) == [2, 6]
    assert not sides[0] & sides[1]
    assert len(division.validation) + len(division.measured) == 40
    source = write(tmp_path / "rows.jsonl", [{"question": text} for text in ("One?", "one", " ONE ")])
    with pytest.raises(DataError, match="3 rows of 1 different question are too few"):
        measure_task(Says(name="t", source=source, variants=Variants(prompts=PLAIN_AND_KIND)), subject())


def test_validation_rows_that_ask_what_is_measured_are_left_out_and_told(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": f"number {number}"} for number in range(10)])
    other = write(tmp_path / "validation.jsonl", [{"question": f"Number {number}?"} for number in range(6, 14)])
    task = Says(name="t", source=source, variants=Variants(prompts=PLAIN_AND_KIND, validation=other, limit=3))
    result = measure_task(task, subject())
    assert (result.details["variants"]["validation_rows"], len(result.rows)) == (3, 10)
    assert result.notes[1].startswith("4 of 8 rows of `validation` are asked in the measured rows, too (validation.jsonl:1, ")
    same = task.model_copy(update={"variants": Variants(prompts=PLAIN_AND_KIND, validation=source)})
    with pytest.raises(DataError, match="all 10 rows of `validation` are asked in the rows that are measured"):
        check_task(same, subject())
    check_task(task, subject())


def test_one_row_is_too_few_to_choose_on(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": "a"}])
    with pytest.raises(DataError, match="too few to choose"):
        measure_task(Says(name="t", source=source, variants=Variants(prompts=(Variant(name="a"), Variant(name="b")))), subject())


# ---- groups and clean rows --------------------------------------------------------------------------------------------------


def test_groups_tell_the_figure_apart_by_a_column(tmp_path: Path) -> None:
    rows = [{"question": "please" if number % 4 == 0 else "no", "topic": "even" if number % 2 == 0 else "odd"} for number in range(20)]
    result = measure_task(Says(name="t", source=write(tmp_path / "rows.jsonl", rows), group_by="topic"), subject())
    table = {row["group"]: row for row in result.details["groups"]["table"]}
    assert (table["even"]["value"], table["even"]["rows"]) == (0.5, 10)
    assert table["even"]["low"] == pytest.approx(wilson(5, 10).low)
    assert table["odd"]["value"] == 0.0


def test_a_group_column_that_is_missing_or_tells_every_row_apart_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": "a", "id": number, "tags": ["x"]} for number in range(300)])
    for column, message in (("topic", "column `topic` is missing"), ("id", "has 300 different values"), ("tags", "no name of a group")):
        with pytest.raises(DataError, match=message):
            measure_task(Says(name="t", source=source, group_by=column), subject())


def test_rows_that_stand_in_training_data_are_left_out_of_a_second_figure(tmp_path: Path) -> None:
    questions = [f"{'please' if number < 4 else 'now'} tell me about the {'abcdefghij'[number] * 6} mountain" for number in range(10)]
    source = write(tmp_path / "rows.jsonl", [{"question": question} for question in questions])
    train = write(tmp_path / "train.jsonl", [{"text": questions[0]}, {"text": questions[1].upper()}, {"text": "quite another text"}])
    result = measure_task(Says(name="t", source=source, leakage=LeakageCheck(train=(train,), min_near=1.0)), subject())
    clean = result.details["clean"]
    assert result.figures["accuracy"].interval.value == 0.4
    assert (clean["rows"], clean["figures"]["accuracy"]["value"]) == (8, 0.25)
    assert [(hit["where"], hit["kind"]) for hit in clean["leaked"]] == [("rows.jsonl:1", "exact"), ("rows.jsonl:2", "same-words")]


def test_without_training_data_nothing_is_said_to_be_clean(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": "please"}])
    assert not measure_task(Says(name="t", source=source, leakage=LeakageCheck()), subject()).details["clean"]["checked"]
    own = measure_task(Says(name="t", source=source, leakage=LeakageCheck()), subject(), trained_on=[source])
    assert own.details["clean"] == {
        "checked": True,
        "training_rows": 1,
        "rows": 0,
        "leaked": [{"where": "rows.jsonl:1", "kind": "exact", "other": "rows.jsonl:1"}],
        "figures": {},
    }


def test_a_weighted_figure_of_all_rows_is_the_figure() -> None:
    values, weights = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
    figure = Figure(wilson(1, 2), values, weights=weights)
    whole = figure.of_rows(np.ones(3, dtype=bool))
    assert whole is not None
    assert whole.interval.value == pytest.approx(11 / 4)
    part = figure.of_rows(np.array([True, False, True]))
    assert part is not None
    assert part.interval.value == pytest.approx(9 / 3)
    assert figure.of_rows(np.zeros(3, dtype=bool)) is None


def test_a_list_of_rows_has_a_hash_of_its_rows() -> None:
    first, second = RowList([("a", {"x": 1})], "l"), RowList([("a", {"x": 2})], "l")
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint() == RowList([("a", {"x": 1})], "m").fingerprint()
