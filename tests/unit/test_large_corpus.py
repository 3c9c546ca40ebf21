"""Opening a corpus that was tokenised before does not read it again, and says the same as the first time."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftcli.data import audit as audits
from ftcli.data import file_hashes, kept_audit
from ftcli.data.audit import MAX_LISTED, AuditReport
from ftcli.data.file_hashes import sha256_of_file
from ftcli.data.prepare import Prepared, prepare
from ftcli.data.settings import Data
from ftcli.data.sources.hub import Hub
from ftcli.data.store import TreeStore
from ftcli.errors import RunError
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
    monkeypatch.setattr(TreeStore, "digest_parts", lambda self: pytest.fail("every example is read"))
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
    parts = list(store.digest_parts())
    assert [len(part) for part in parts] == [2, 2, 1]
    digests = np.concatenate(parts).tolist()
    assert digests == store._heads["digest"][:-1].tolist()
    assert digests[0] == digests[2] != digests[1]


class Digests:
    """A store of which only the digests are asked for."""

    def __init__(self, name: str, digests: list[int]) -> None:
        self.name, self._digests = name, np.array(digests, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._digests)

    def where(self, index: int) -> str:
        return f"{self.name}:{index}"

    def digest_parts(self) -> Any:
        yield from np.array_split(self._digests, 3)


def audited_by_hand(train: list[Digests], evaluation: list[Digests]) -> AuditReport:
    """What repeats, told one example after the other."""
    first: dict[int, str] = {}
    duplicates, num_overlap, overlap = [], Counter[str](), []
    for store in train:
        for index, value in enumerate(store._digests.tolist()):
            if value in first:
                duplicates.append((store.where(index), first[value]))
            first.setdefault(value, store.where(index))
    for store in evaluation:
        for index, value in enumerate(store._digests.tolist()):
            if value in first:
                num_overlap[store.name] += 1
                overlap.append((store.where(index), first[value]))
    return AuditReport(len(duplicates), duplicates[:MAX_LISTED], dict(num_overlap), overlap[:MAX_LISTED])


@pytest.mark.parametrize("bucket_examples", [1, 7, 50, 10_000])
@pytest.mark.parametrize("num_values", [3, 60, 2**63])
def test_an_audit_in_buckets_finds_what_a_walk_through_all_finds(
    bucket_examples: int, num_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audits, "BUCKET_EXAMPLES", bucket_examples)
    rng = np.random.default_rng(num_values % 1000)
    lists = [rng.integers(0, num_values, size, dtype=np.uint64).tolist() for size in (40, 0, 90, 30, 1, 25)]
    lists[-1] += lists[0][5:9]
    stores = [Digests(name, digests) for name, digests in zip("abcxyz", lists, strict=True)]
    train, evaluation = stores[:3], stores[3:]
    by_hand = audited_by_hand(train, evaluation)
    assert by_hand.num_overlap["z"] >= 4
    assert audits.audit(train, evaluation, tmp_path) == by_hand  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert audits.audit(train, [], tmp_path) == audited_by_hand(train, [])  # type: ignore[arg-type]
    assert audits.audit([], evaluation, tmp_path).num_duplicates == 0  # type: ignore[arg-type]


def test_a_full_disk_stops_the_audit_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(kept_audit, "audit", full)
    with pytest.raises(RunError, match="the disk is full: examples that stand in the data twice"):
        prepared(tmp_path, ["a fox"])


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
