"""Texts in blocks: every block is equally long, every target is there once, and no text sees another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcli.data.look import look
from ftcli.data.mixtures.passes import Passes
from ftcli.data.order import Order
from ftcli.data.prepare import prepare
from ftcli.data.settings import Data
from ftcli.data.store import TreeStore
from ftcli.errors import DataError
from ftcli.models.tokenizer import Tokenizer, load_tokenizer

MAX_LENGTH = 16
TEXTS = ["ab", "the quick brown fox jumps over the lazy dog " * 3, "c", "de" * 40, "one two three", "x" * 15, "y" * 14, "z" * 16] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("builtin:tiny")


def stored(folder: Path, tokenizer: Tokenizer, unit: str, **options: Any) -> TreeStore:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    source = {"source": {"kind": "file", "path": str(path)}, "unit": unit}
    data = Data.model_validate({"train": (source,), "holdout": 0.0, "max_length": MAX_LENGTH, "workers": 1, **options})
    return prepare(data, tokenizer, cache_folder=folder / "cache").train[0]


def targets(store: TreeStore) -> list[tuple[int, int]]:
    """(row, token) of every target."""
    found = []
    for index in range(len(store)):
        tree = store.tree(index)
        for start, end, _, _ in tree.spans.tolist():
            found += [(tree.row, token) for token in tree.tokens[max(start, 1) : end].tolist()]
    return found


def test_every_block_but_the_last_is_full(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = stored(tmp_path, tokenizer, "block")
    assert set(store.example_lengths[:-1].tolist()) <= {MAX_LENGTH, MAX_LENGTH - 1}
    assert (store.example_lengths[:-1] == MAX_LENGTH).mean() > 0.8
    assert store.first_trees is not None
    by_block = [store.lengths[first:last].sum() for first, last in zip(store.first_trees, store.first_trees[1:], strict=False)]
    assert by_block == store.example_lengths.tolist()
    assert int(store.example_lengths.sum()) == store.report.num_tokens == int(store.lengths.sum())


def test_every_target_is_in_exactly_one_block(tmp_path: Path, tokenizer: Tokenizer) -> None:
    blocks, rows = stored(tmp_path, tokenizer, "block"), stored(tmp_path, tokenizer, "row")
    assert targets(blocks) == targets(rows)
    whole = [tree.tree(index) for tree in (blocks, rows) for index in range(len(tree))]
    assert sum(tree.num_bytes for tree in whole[: len(blocks)]) == sum(tree.num_bytes for tree in whole[len(blocks) :])


def test_each_text_of_a_block_is_a_tree_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = stored(tmp_path, tokenizer, "block")
    ends = [store.tree(index).tokens.tolist()[:-1].count(tokenizer.eos_id) for index in range(len(store))]
    assert max(ends) == 0
    assert all(len(store.tree(index).starts) == 1 for index in range(len(store)))


def test_a_step_has_so_many_blocks_and_a_pass_every_tree_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = stored(tmp_path, tokenizer, "block")
    size = len(store.example_lengths)
    order = Order([size], [store.mean_tokens], [1.0], Passes(), first_trees=[store.first_trees], global_batch_size=4, epochs=1, seed=1)
    steps = [order.examples_at(step) for step in range(1, order.num_steps + 1)]
    assert sorted(tree for step in steps for _, tree in step) == list(range(len(store)))
    tokens = [sum(int(store.lengths[tree]) for _, tree in step) for step in steps[:-1]]
    assert sorted(tokens)[1] >= 4 * (MAX_LENGTH - 1)  # one step may have the last block, which is short
    assert max(tokens) <= 4 * MAX_LENGTH
    assert order.num_steps == -(-size // 4)


def test_blocks_do_not_depend_on_the_number_of_processes(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.data import chunks

    monkeypatch.setattr(chunks, "CHUNK_ROWS", 10)
    stores = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        stores.append(stored(tmp_path / str(workers), tokenizer, "block", workers=workers))
    for name in ("tokens", "lengths", "blocks", "spans"):
        first, second = ((store.folder / f"{name}.bin").read_bytes() for store in stores)
        assert first == second
    assert stores[0].first_trees is not None
    assert (np.diff(stores[0].first_trees) > 0).all()


@pytest.mark.parametrize(
    "options", [{"on_overflow": "drop"}, {"train": ({"source": {"kind": "builtin", "name": "orders"}, "unit": "block"},)}]
)
def test_blocks_of_what_cannot_be_cut_are_refused(tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="`unit: block` cuts texts where blocks end"):
        stored(tmp_path, tokenizer, "block", **options)


def test_a_look_sees_blocks_too(tokenizer: Tokenizer) -> None:
    source = {"source": {"kind": "builtin", "name": "stories"}, "unit": "block"}
    assert look(Data.model_validate({"train": (source,), "max_length": 64}), tokenizer, 5)[0].num_examples > 5
