"""From the recipe's `data` to trees: what is counted, held out, refused and found twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcli.data import chunks
from ftcli.data.formats.completion import Completion
from ftcli.data.holdout import held_out
from ftcli.data.look import look
from ftcli.data.prepare import Prepared, examples_of, prepare
from ftcli.data.settings import Data
from ftcli.data.sources.file import File
from ftcli.data.store import TreeStore
from ftcli.data.tree import target_weights
from ftcli.data.verdict import nothing_to_train
from ftcli.errors import DataError, RequestError
from ftcli.models.tokenizer import Tokenizer

MakeTokenizer = Callable[..., Tokenizer]
Rows = list[dict[str, Any]]


@pytest.fixture
def tokenizer(make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Rows], dict[str, Any]]:
    """Writes rows to a file and gives the entry of a recipe for it."""

    def write(name: str, rows: Rows) -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {"source": {"kind": "file", "path": str(path)}}

    return write


Write = Callable[[str, Rows], dict[str, Any]]


def settings(*train: dict[str, Any], **given: Any) -> Data:
    return Data.model_validate({"train": list(train), "holdout": 0.0, "workers": 1} | given, strict=False)


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Prepared]:
    def run(*train: dict[str, Any], first_rows: int | None = None, **given: Any) -> Prepared:
        return prepare(settings(*train, **given), tokenizer, cache_folder=tmp_path / "cache", first_rows=first_rows)

    return run


Run = Callable[..., Prepared]


def pairs(count: int, **more: Any) -> Rows:
    return [{"prompt": f"q{number}:", "completion": f" a{number}"} | more for number in range(count)]


def texts_of(store: TreeStore, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(store.tree(index).tokens.tolist()) for index in range(len(store))]


def test_a_store_gives_back_every_tree(write: Write, run: Run, tokenizer: Tokenizer) -> None:
    (store,) = run(write("orders", pairs(30))).train
    assert texts_of(store, tokenizer) == [f"q{number}: a{number}</s>" for number in range(30)]
    tree = store.tree(12)
    assert tokenizer.decode(tree.tokens[target_weights(tree, 0.0) > 0].tolist()) == " a12</s>"
    assert (tree.row, tree.num_bytes, tree.tokens.dtype) == (12, 4, np.dtype(np.int32))
    assert store.lengths.tolist() == [len(store.tree(index)) for index in range(30)]
    assert store.where(12) == "orders row 13"
    with pytest.raises(IndexError):
        store.tree(30)


def test_the_report_counts_what_became_of_the_rows(write: Write, run: Run) -> None:
    rows = [*pairs(8), *pairs(2, weight=0.0), {"prompt": "x" * 30, "completion": "y"}]
    (store,) = run(write("orders", rows), max_length=20, on_overflow="drop").train
    report = store.report
    assert (report.rows_read, report.num_examples, report.dropped) == (11, 8, {"no target": 2, "too long": 1})
    assert (report.num_overlong, report.overlong) == (1, [("orders.jsonl:11", 32)])
    assert (report.num_tokens, report.num_targets, report.num_bytes) == (8 * 7, 8 * 4, 8 * 3)
    assert (report.length_p50, report.length_p95, report.length_max) == (7, 32, 32)
    assert (report.first_target, report.last_target) == (" ", "</s>")
    assert report.to_json()["trained_ratio"] == pytest.approx(4 / 7)
    assert "2 rows dropped: no target" in report.line()


def test_loss_weight_scales_what_is_read_and_not_what_is_kept(write: Write, run: Run) -> None:
    entry = write("orders", pairs(3, weight=0.5))
    (plain,) = run(entry).train
    (scaled,) = run(entry | {"loss_weight": 3.0}).train
    assert scaled.report.cache_hit
    assert plain.tree(0).spans["weight"].tolist() == [0.5, 0.5]
    assert scaled.tree(0).spans["weight"].tolist() == [1.5, 1.5]


def test_limit_and_first_rows_take_the_first_rows(write: Write, run: Run, tokenizer: Tokenizer) -> None:
    entry = write("orders", pairs(9))
    assert len(run(entry | {"limit": 4}).train[0]) == 4
    assert len(run(entry | {"limit": 4}, first_rows=2).train[0]) == 2
    assert texts_of(run(entry, first_rows=1).train[0], tokenizer) == ["q0: a0</s>"]


def test_too_long_rows_are_all_told_at_once(write: Write, run: Run) -> None:
    rows = pairs(20) + [{"prompt": "x", "completion": "y" * (20 + number)} for number in range(12)]
    with pytest.raises(DataError) as caught:
        run(write("orders", rows), max_length=20)
    message = str(caught.value)
    assert "12 rows of 32 in `orders` are longer than `data.max_length` (20); the first 10" in message
    assert "orders.jsonl:21: 22 tokens, 2 too many" in message
    assert all(word in message for word in ("half of the rows have at most 9 tokens", "`drop`, `truncate_prompt` or `split`"))
    assert len(caught.value.problems) == 1 + 10


def test_auto_splits_texts_and_refuses_the_rest(write: Write, run: Run) -> None:
    text = write("stories", [{"text": "word " * 20}, {"text": "short"}])
    (store,) = run(text, max_length=32).train
    assert store.report.on_overflow == "split"
    assert len(store) == 5  # 101 tokens in blocks of 32 that share one: 4, and the short one
    assert store.report.num_bytes == 100 + 5
    assert store.rows.tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(DataError, match="longer than"):
        run(write("orders", [{"prompt": "x" * 40, "completion": "y"}]), max_length=32)


def test_wrong_rows_are_told_together_and_nothing_is_kept(write: Write, run: Run, tmp_path: Path) -> None:
    rows: Rows = [*pairs(3), {"prompt": "x"}, {"prompt": "y"}, {"prompt": 5, "completion": "z"}, *pairs(2)]
    with pytest.raises(DataError) as caught:
        run(write("orders", rows) | {"format": {"kind": "completion"}})
    message = str(caught.value)
    assert "3 rows of the first 8 in `orders` cannot be used" in message
    assert "orders.jsonl:4 and 1 more row: " in message
    assert "orders.jsonl:6: " in message
    assert [path.suffix for path in (tmp_path / "cache" / "trees").iterdir()] == [".lock"]


def test_reading_stops_when_every_row_is_wrong(write: Write, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 15)
    with pytest.raises(DataError, match=r"15 rows of the first 15 in `orders` cannot be used; the first 10"):
        run(write("orders", pairs(500)) | {"format": {"kind": "chat"}})


def test_all_sources_are_checked_before_any_error_is_told(write: Write, run: Run, tmp_path: Path) -> None:
    missing = {"source": {"kind": "file", "path": str(tmp_path / "none.jsonl")}}
    with pytest.raises(DataError) as caught:
        run(missing, write("strange", [{"colour": 1}]), write("orders", pairs(3)))
    message = str(caught.value)
    assert "none.jsonl" in message
    assert "strange" in message


@pytest.mark.parametrize("act", ["prepare", "look"])
def test_a_source_that_trains_nothing_is_refused(write: Write, run: Run, tokenizer: Tokenizer, act: str) -> None:
    entry = write("orders", pairs(4, weight=0.0))
    with pytest.raises(DataError, match=r"orders: trains nothing: of 4 rows none is left \(no target: 4\)"):
        run(entry) if act == "prepare" else look(settings(entry), tokenizer)


@pytest.mark.parametrize("last", [[], [{"role": "assistant", "content": "b", "train": False}]])
def test_chats_without_a_trained_answer_are_left_out_and_counted(
    write: Write, run: Run, tokenizer: Tokenizer, last: list[dict[str, Any]]
) -> None:
    question = {"role": "user", "content": "a"}
    trained, untrained = [question, {"role": "assistant", "content": "b"}], [question, *last]
    prepared = run(write("chats", [{"messages": messages} for messages in (trained, untrained, trained)]))
    assert prepared.train[0].report.dropped == {"no target": 1}
    assert "1 of 3 rows of `chats` left out: no target" in prepared.notes
    with pytest.raises(DataError, match=r"chats: trains nothing: of 1 rows none is left \(no target: 1\)"):
        look(settings(write("chats", [{"messages": untrained}])), tokenizer)


def test_a_column_that_looks_like_the_answer_and_is_not_read_is_noted_once(write: Write, run: Run, tokenizer: Tokenizer) -> None:
    entry = write("reviews", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    note = "`reviews` reads column text only; not read: label"
    assert run(entry, evaluation=[entry]).notes.count(note) == 1
    assert look(settings(entry), tokenizer)[0].unread == note.removeprefix("`reviews` ")


def test_answers_that_never_stop_are_refused(tokenizer: Tokenizer) -> None:
    tally = chunks.Tally(rows_read=5, num_examples=4, num_without_stop=4, dropped=Counter({"too long": 1}))
    work = chunks.Work(Completion(), tokenizer, 20, "drop")
    problem = nothing_to_train(tally, "orders", work)
    assert problem is not None
    assert "the model would not learn to stop" in problem.what
    assert nothing_to_train(replace(tally, num_without_stop=3), "orders", work) is None


def test_answers_need_not_stop_where_the_recipe_says_so(write: Write, run: Run) -> None:
    (store,) = run(write("orders", pairs(4)) | {"format": {"kind": "completion", "append_eos": False}}).train
    assert store.report.num_without_stop == 4


def test_names_are_unique_in_their_part(write: Write, run: Run) -> None:
    orders, more = write("orders", pairs(3)), write("more", pairs(4))
    prepared = run(orders, orders, more | {"name": "orders-2"}, evaluation=[orders, more])
    assert [store.name for store in prepared.train] == ["orders", "orders-3", "orders-2"]
    assert [store.name for store in prepared.evaluation] == ["orders", "more"]
    with pytest.raises(DataError, match=r"data\.train\.1\.name: `x` is the name of another source"):
        run(orders | {"name": "x"}, more | {"name": "x"})


def test_holdout_divides_by_content_and_not_by_order(write: Write, run: Run, tokenizer: Tokenizer) -> None:
    rows = pairs(200)
    first = run(write("orders", rows), holdout=0.1)
    second = run(write("turned", rows[::-1]), holdout=0.1)
    held_out = [set(texts_of(prepared.evaluation[0], tokenizer)) for prepared in (first, second)]
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 20
    assert held_out[0] | set(texts_of(first.train[0], tokenizer)) == {f"q{number}: a{number}</s>" for number in range(200)}
    assert not first.audit.num_overlap
    assert (first.evaluation[0].name, first.evaluation[0].role) == ("orders-holdout", "target")
    assert "20 rows of `orders` are held out as `orders-holdout`" in first.notes


@pytest.mark.parametrize(
    ("count", "share", "held_out"), [(19, 0.05, 0), (20, 0.05, 1), (20, 0.01, 1), (200, 0.05, 10), (4, 0.5, 2), (1, 0.9, 0)]
)
def test_how_many_rows_are_held_out(write: Write, run: Run, count: int, share: float, held_out: int) -> None:
    prepared = run(write("orders", pairs(count)), holdout=share)
    assert sum(map(len, prepared.evaluation)) == held_out
    assert len(prepared.train[0]) == count - held_out


def test_at_most_a_thousand_rows_are_held_out() -> None:
    assert len(held_out(pairs(30_000), 0.05).places) == 1000


def test_copies_of_a_row_stay_on_one_side() -> None:
    found = held_out(pairs(50) * 3, 0.1).places
    assert len(found) in (12, 15)
    assert {place % 50 for place in found} == {place for place in found if place < 50}
    assert not held_out(pairs(1) * 100, 0.1).places
    assert len(held_out(pairs(10) * 2, 0.05).places) == 2


def test_a_later_row_is_held_out_if_it_is_a_copy_and_not_for_its_small_hash() -> None:
    rows = pairs(400)
    first, whole = held_out(rows[:200], 0.05), held_out(rows, 0.05)
    small = next(place for place in whole.places if place >= 200)
    assert not first.has(small, rows[small])
    assert all(first.has(200 + place, rows[place]) for place in first.places)


def test_a_source_is_read_three_times_to_hold_rows_out_of_it(write: Write, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    num_read = 0
    read = File.rows

    def counted(source: File) -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal num_read
        for row in read(source):
            num_read += 1
            yield row

    monkeypatch.setattr(File, "rows", counted)
    run(write("orders", pairs(2000)), holdout=0.05)
    # once to choose, once for either side, and some first rows
    assert num_read <= 3 * 2000 + 200


def test_nothing_is_held_out_where_there_is_an_evaluation_or_a_second_source(write: Write, run: Run) -> None:
    orders, more = write("orders", pairs(40)), write("more", pairs(30))
    assert [store.name for store in run(orders, evaluation=[more], holdout=0.1).evaluation] == ["more"]
    assert run(orders, more, holdout=0.1).evaluation == []


def test_held_out_rows_that_are_all_dropped_are_no_error(write: Write, run: Run) -> None:
    rows = pairs(20)
    (place,) = held_out(rows, 0.05).places
    entry = write("orders", [*rows[:place], *rows[place + 1 :], rows[place] | {"weight": 0.0}])
    prepared = run(entry, holdout=0.05)
    assert sum(map(len, [*prepared.train, *prepared.evaluation])) >= 19


def test_duplicates_and_overlap_are_counted(write: Write, run: Run) -> None:
    train = write("orders", [*pairs(10), *pairs(3)])
    more = write("more", pairs(1))
    audit = run(
        train, more, evaluation=[write("test", [{"prompt": "new", "completion": "row"}, *pairs(2)]), write("fresh", pairs(12)[10:])]
    ).audit
    assert audit.num_duplicates == 4
    assert audit.duplicates[:2] == [("orders row 11", "orders row 1"), ("orders row 12", "orders row 2")]
    assert audit.duplicates[3] == ("more row 1", "orders row 1")
    assert audit.num_overlap == {"test": 2}
    assert audit.overlap == [("test row 2", "orders row 1"), ("test row 3", "orders row 2")]
    assert len(audit.lines()) == 2


def test_examples_of_gives_the_rows_of_a_store(write: Write, run: Run, tokenizer: Tokenizer) -> None:
    prepared = run(write("orders", pairs(100)), holdout=0.1)
    store = prepared.evaluation[0]
    examples = list(examples_of(store, tokenizer, limit=3))
    assert ["".join(segment.text for segment in example.segments) for _, example in examples] == texts_of(store, tokenizer)[:3]
    assert examples[0][0] == f"orders.jsonl:{store.tree(0).row + 1}"
    assert len(list(examples_of(store, tokenizer))) == 10


def test_look_shows_what_the_first_rows_become_and_writes_nothing(write: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = settings(write("orders", pairs(100)), evaluation=[write("test", pairs(3))])
    train, evaluation = look(data, tokenizer, rows_per_source=10)
    assert (train.part, train.name, train.format, train.is_detected, train.num_rows) == ("train", "orders", "completion", True, 10)
    assert (evaluation.part, evaluation.num_rows, evaluation.num_examples) == ("evaluation", 3, 3)
    assert train.wheres[9] == "orders.jsonl:10"
    assert len(train.trees) == 10
    assert not (tmp_path / "cache").exists()


def test_look_tells_all_problems_of_all_sources(write: Write, tokenizer: Tokenizer) -> None:
    long = write("long", [{"prompt": "x" * 50, "completion": "y"}])
    wrong = write("wrong", [{"prompt": "a"}]) | {"format": {"kind": "completion"}}
    with pytest.raises(DataError) as caught:
        look(settings(long, wrong, max_length=20), tokenizer)
    assert all(word in str(caught.value) for word in ("long.jsonl:1: 52 tokens", "wrong.jsonl:1: ", "`data.max_length`"))


def test_look_takes_only_the_beginning_of_a_book(write: Write, tokenizer: Tokenizer) -> None:
    (found,) = look(settings(write("book", [{"text": "word " * 100_000}])), tokenizer)
    assert found.num_tokens < 3000


def test_a_missing_template_is_told_at_once(write: Write, make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    entry = write("chats", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    with pytest.raises(RequestError, match="no chat template"):
        prepare(settings(entry), make_tokenizer(template=None), cache_folder=tmp_path)


@pytest.mark.real
def test_real_chats_are_prepared_whole(shared: Path, make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    entry = {"source": {"kind": "file", "path": str(shared / "data" / "gsm8k_train.jsonl")}, "limit": 300}
    tokenizer = make_tokenizer()
    prepared = prepare(settings(entry, max_length=4096), tokenizer, cache_folder=tmp_path)
    (store,) = prepared.train
    assert store.report.num_examples == 300
    assert (store.report.num_without_stop, store.report.last_target) == (0, "<|im_end|>")
    rows = [json.loads(line) for line in (shared / "data" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:300]]
    for index in range(0, 300, 50):
        tree = store.tree(index)
        answer = tokenizer.decode(tree.tokens[target_weights(tree, 0.0) > 0].tolist())
        assert answer == rows[index]["messages"][-1]["content"].strip() + "<|im_end|>"


def test_special_tokens_within_texts_are_told_of_and_stay_such(write: Write, run: Run, tokenizer: Tokenizer) -> None:
    prepared = run(write("dump", [{"text": "one</s>two"}, {"text": "three"}, {"text": "<|im_end|>four"}]))
    (store,) = prepared.train
    assert store.tree(0).tokens.tolist().count(tokenizer.eos_id) == 2
    assert store.report.num_with_special == 1
    assert any(note.startswith("special tokens are written out in 1 of 3 texts of `dump`") for note in prepared.notes)
    chats = run(write("chats", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]))
    assert chats.train[0].report.num_with_special == 0
