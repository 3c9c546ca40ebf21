"""Training on a source that is still being tokenised sees what it would see of a complete store."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcli.data import chunks
from ftcli.data import prepare as preparing
from ftcli.data.growing import FirstTrees, GrowingStore
from ftcli.data.mixtures.stream import Stream
from ftcli.data.order import Order
from ftcli.data.prepare import Prepared, prepare
from ftcli.data.settings import Data
from ftcli.data.sources.file import File
from ftcli.errors import DataError, RecipeError
from ftcli.models.tokenizer import load_tokenizer
from ftcli.recipe.load import load_recipe

NUM_ROWS, CHUNK_ROWS, WINDOW = 100, 10, 16


class Gate:
    """Lets so many rows of every file through."""

    def __init__(self) -> None:
        self.num_rows, self.changed = 0, threading.Condition()

    def open(self, num_rows: int) -> None:
        with self.changed:
            self.num_rows = num_rows
            self.changed.notify_all()

    def rows(self, rows: Iterator[Any]) -> Iterator[Any]:
        for number, row in enumerate(rows):
            with self.changed:
                assert self.changed.wait_for(lambda number=number: number < self.num_rows, timeout=60)  # type: ignore[misc]
            yield row


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Rows come as far as the gate is open, in chunks of ten; the first windows are enough to begin."""
    gate, rows = Gate(), File.rows
    monkeypatch.setattr(File, "rows", lambda self: gate.rows(rows(self)))
    monkeypatch.setattr(chunks, "CHUNK_ROWS", CHUNK_ROWS)
    monkeypatch.setattr(preparing, "MIN_ARRIVED", 1)
    return gate


def write_rows(folder: Path, wrong: int | None = None) -> Path:
    path = folder / "texts.jsonl"
    texts = [f"text {number} " + "of a fox and a dog " * (number % 7) for number in range(NUM_ROWS)]
    path.write_text("".join(json.dumps({"text": 5 if number == wrong else text}) + "\n" for number, text in enumerate(texts)))
    return path


def prepared(folder: Path, unit: str, cache: str = "cache", wrong: int | None = None) -> Prepared:
    entry = {"source": {"kind": "file", "path": str(write_rows(folder, wrong))}, "format": {"kind": "text"}, "unit": unit}
    mixture = {"kind": "stream", "window": WINDOW}
    data = Data.model_validate({"train": (entry,), "holdout": 0.0, "max_length": 32, "workers": 1, "mixture": mixture})
    return prepare(data, load_tokenizer("builtin:tiny"), cache_folder=folder / cache, may_grow=True)


def order_of(found: Prepared, steps: int) -> Order:
    store = found.train[0]
    return Order(
        [len(store.example_lengths)],
        [store.mean_tokens],
        [1.0],
        Stream(window=WINDOW),
        first_trees=FirstTrees(found.train),
        global_batch_size=4,
        steps=steps,
        seed=3,
        arrived=lambda source, count: store.arrived(count),
    )


def seen(found: Prepared, order: Order, steps: range) -> list[tuple[int, list[int]]]:
    return [(tree, found.train[0].tree(tree).tokens.tolist()) for step in steps for _, tree in order.examples_at(step)]


@pytest.mark.parametrize("unit", ["row", "block"])
def test_a_growing_store_gives_what_a_complete_one_gives(tmp_path: Path, gate: Gate, unit: str) -> None:
    gate.open(NUM_ROWS)
    whole = prepared(tmp_path, unit, "whole")
    store = whole.train[0]
    store.arrived(10**9)
    steps = 3 * len(store.example_lengths) // 4 + 5
    expected = seen(whole, order_of(whole, steps), range(1, steps + 1))
    gate.open(45)
    found = prepared(tmp_path, unit)
    growing = found.train[0]
    assert isinstance(growing, GrowingStore)
    assert not growing.is_complete
    assert found.audit.num_duplicates == 0
    assert any("what repeats in it is not looked for" in note for note in found.notes)
    order = order_of(found, steps)
    first = seen(found, order, range(1, 3))
    assert not growing.is_complete
    gate.open(NUM_ROWS)
    assert first + seen(found, order, range(3, steps + 1)) == expected
    assert growing.is_complete
    assert growing.report == store.report
    assert order.repeats()[0] == pytest.approx(steps * 4 / len(store.example_lengths))
    warm = prepared(tmp_path, unit)
    assert not isinstance(warm.train[0], GrowingStore)
    assert seen(warm, order_of(warm, steps), range(1, steps + 1)) == expected


def test_each_window_is_seen_whole_before_the_next(tmp_path: Path, gate: Gate) -> None:
    gate.open(NUM_ROWS)
    found = prepared(tmp_path, "row")
    found.train[0].arrived(10**9)
    size = len(found.train[0])
    steps = size // 2 + 1
    order = order_of(found, steps)
    trees = np.array([tree for step in range(1, steps + 1) for _, tree in order.examples_at(step)])
    first, second = trees[:size], trees[size : 2 * size]
    for one_pass in (first, second):
        assert sorted(one_pass.tolist()) == list(range(size))
        assert ((one_pass // WINDOW) == np.arange(size) // WINDOW).all()
    assert first.tolist() != second.tolist()
    assert (np.diff(first[:WINDOW]) < 0).any()


def test_what_is_wrong_with_a_later_row_stops_the_run(tmp_path: Path, gate: Gate) -> None:
    gate.open(45)
    found = prepared(tmp_path, "row", wrong=80)
    order = order_of(found, 30)
    order.examples_at(1)
    gate.open(NUM_ROWS)
    with pytest.raises(DataError, match="texts"):
        order.examples_at(28)


def test_a_stopped_store_goes_on_from_its_chunks(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.data import cache

    gate.open(45)
    found = prepared(tmp_path, "row")
    closer = threading.Thread(target=found.train[0].close)
    closer.start()
    gate.open(50)
    closer.join(60)
    assert not closer.is_alive()
    order_of(found, 2).examples_at(1)
    [partial] = (tmp_path / "cache" / "trees").glob("*.partial")
    num_finished = len(list(partial.glob("chunk-*.npz")))
    assert num_finished >= 3
    made: list[int] = []

    def tokenise(rows: list[Any], work: Any) -> Any:
        made.append(len(rows))
        return chunks.tokenise_chunk(rows, work)

    monkeypatch.setattr(cache, "tokenise_chunk", tokenise)
    gate.open(NUM_ROWS)
    again = prepared(tmp_path, "row").train[0]
    again.arrived(10**9)
    assert again.report.rows_read == NUM_ROWS
    assert len(made) == NUM_ROWS // CHUNK_ROWS - num_finished


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train": {"epochs": 1}}, "does not know how long an epoch is"),
        ({"data": {"holdout": 0.1}}, "cannot hold rows out"),
        ({"objective": {"kind": "classification"}}, "does not know all labels"),
        ({"method": {"kind": "freeze", "cache_frozen": True}}, "of a stream nobody knows"),
    ],
)
def test_what_hangs_on_all_rows_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    document: dict[str, Any] = {
        "version": 1,
        "name": "stream",
        "model": {"base": "builtin:tiny"},
        "data": {"train": [{"source": {"kind": "builtin", "name": "stories"}}], "holdout": 0, "mixture": {"kind": "stream"}},
        "method": {"kind": "full"},
        "train": {"steps": 4, "lr": 1e-3},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document))
    load_recipe(path)
    for section, values in changes.items():
        document[section] = {**document[section], **values} if section == "data" else values
    path.write_text(json.dumps(document))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert any(problem in found.what for found in caught.value.problems)
