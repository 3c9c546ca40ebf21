"""Opening a corpus that was tokenised before does not read it again, and says the same as the first time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcli.data import file_hashes, kept_audit
from ftcli.data.file_hashes import sha256_of_file
from ftcli.data.prepare import Prepared, prepare
from ftcli.data.settings import Data
from ftcli.data.sources.hub import Hub
from ftcli.data.store import TreeStore
from ftcli.models.tokenizer import load_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def prepared(folder: Path, texts: list[str], **source: Any) -> Prepared:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    entry = {"source": {"kind": "file", "path": str(path)}, **source}
    data = Data.model_validate({"train": (entry,), "evaluation": ({**entry, "name": "same", "limit": 2},), "max_length": 32})
    return prepare(data, load_tokenizer("builtin:tiny"), cache_folder=folder / "cache")


def test_an_audit_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a fox", "a dog", "a fox", "a cat"]
    first = prepared(tmp_path, texts)
    assert first.audit.num_duplicates == 1
    monkeypatch.setattr(kept_audit, "audit", lambda *stores: pytest.fail("audited again"))
    monkeypatch.setattr(TreeStore, "digests", property(lambda self: pytest.fail("every example is read")))
    again = prepared(tmp_path, texts)
    assert again.audit == first.audit
    assert again.notes == first.notes
    with pytest.raises(pytest.fail.Exception, match="audited again"):
        prepared(tmp_path, [*texts, "a cow"])
    with pytest.raises(pytest.fail.Exception, match="audited again"):
        prepared(tmp_path, texts, name="other")


def test_a_damaged_note_is_as_none(tmp_path: Path) -> None:
    first = prepared(tmp_path, ["a fox", "a fox"])
    [note] = (tmp_path / "cache" / "audits").iterdir()
    note.write_text('{"num_dupl')
    assert prepared(tmp_path, ["a fox", "a fox"]).audit == first.audit


def test_digests_are_those_of_the_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftcli.data import store as stores

    monkeypatch.setattr(stores, "READ_TREES", 2)
    store = prepared(tmp_path, ["a fox", "a dog", "a fox", "a cat", "a cow"]).train[0]
    assert store.digests.tolist() == np.asarray(store._heads["digest"][:-1]).tolist()
    assert store.digests[0] == store.digests[2] != store.digests[1]


@pytest.fixture
def large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, last changed an hour ago."""
    monkeypatch.setattr(file_hashes, "MIN_BYTES", 4)
    path = tmp_path / "rows.jsonl"
    path.write_text("first")
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    return path


def test_a_file_is_hashed_once_until_it_changes(large_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sha256_of_file(large_file, tmp_path / "cache")
    read = file_hashes._read
    monkeypatch.setattr(file_hashes, "_read", lambda path: pytest.fail("read again"))
    assert sha256_of_file(large_file, tmp_path / "cache") == first
    monkeypatch.setattr(file_hashes, "_read", read)
    large_file.write_text("other")
    assert sha256_of_file(large_file, tmp_path / "cache") != first


def test_a_file_that_has_just_changed_is_not_trusted(large_file: Path, tmp_path: Path) -> None:
    os.utime(large_file)
    sha256_of_file(large_file, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_streamed_data_set_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows() -> Any:
        yield from ({"text": f"text {number}"} for number in range(5))

    asked: list[dict[str, Any]] = []

    def load_dataset(*names: Any, **options: Any) -> Any:
        asked.append(options)
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Hub(dataset="own/data", revision=COMMIT, streaming=True)
    assert [row["text"] for _, row in source.rows()] == [f"text {number}" for number in range(5)]
    assert asked[0]["streaming"] is True
    assert source.fingerprint() == source.fingerprint() != Hub(dataset="own/data", revision=COMMIT[::-1], streaming=True).fingerprint()
    assert len(asked) == 1
    entry = {"source": source.model_dump(), "limit": 3}
    data = Data.model_validate({"train": (entry,), "holdout": 0.0, "workers": 1})
    assert prepare(data, load_tokenizer("builtin:tiny"), cache_folder=tmp_path).train[0].report.rows_read == 3
