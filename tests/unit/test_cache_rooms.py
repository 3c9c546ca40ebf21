"""What the cache holds beside tokenised sources is listed with its size, and cleared, but for what somebody may need."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ftcli.cli.cache import app
from ftcli.data.cache_rooms import clear_rooms, rooms

OLD = time.time() - 100 * 86400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts of two bases, one of them being written, an audit, a tokenizer, and a tokenised source that is damaged."""
    folder = tmp_path / "cache"
    for name, size in (
        ("self/old/self.jsonl", 100), ("self/new/self.partial", 50), ("audits/a.json", 10), ("tokenizers/t/tokenizer.json", 7),
        ("trees/abcdef/meta.json", 3),
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b" " * size)
    os.utime(folder / "self/old/self.jsonl", (OLD, OLD))
    monkeypatch.setenv("FTCLI_CACHE", str(folder))
    return folder


def listed(folder: Path) -> list[tuple[str, int, int]]:
    return [(room.name, room.entries, room.num_bytes) for room in rooms(folder)]


def test_rooms_are_listed_with_their_sizes(cache: Path) -> None:
    assert listed(cache) == [("audits", 1, 10), ("self", 2, 150), ("tokenizers", 1, 7)]
    assert rooms(cache / "nowhere") == []
    said = CliRunner().invoke(app, ["ls"]).stdout
    assert "replay text that bases wrote themselves" in said
    assert "5 entries (170 B)" in said
    kept = json.loads(CliRunner().invoke(app, ["ls", "--json"]).stdout)
    assert [room["name"] for room in kept["rooms"]] == ["audits", "self", "tokenizers"]


def test_clearing_all_leaves_what_is_being_written_and_tokenizers(cache: Path) -> None:
    said = CliRunner().invoke(app, ["clear"]).stdout
    assert "removed 3 entries (113 B)" in said
    assert "left 1 in self: another process may be writing there" in said
    assert listed(cache) == [("self", 1, 50), ("tokenizers", 1, 7)]
    assert not (cache / "trees" / "abcdef").exists()
    os.utime(cache / "self/new/self.partial", (OLD, OLD))
    clear_rooms(cache)
    assert listed(cache) == [("tokenizers", 1, 7)]


def test_a_room_is_cleared_by_its_name_and_a_store_by_its_key(cache: Path) -> None:
    assert "removed 1 entry (7 B)" in CliRunner().invoke(app, ["clear", "tokenizers"]).stdout
    assert (cache / "trees" / "abcdef").is_dir()
    assert "removed 1 entry (3 B)" in CliRunner().invoke(app, ["clear", "abc"]).stdout
    assert listed(cache) == [("audits", 1, 10), ("self", 2, 150)]
    failed = CliRunner().invoke(app, ["clear", "audits", "nonsense"])
    assert "`nonsense` is no key" in str(failed.exception)
    assert ("audits", 1, 10) in listed(cache)


def test_what_was_used_lately_stays_when_only_older_things_are_cleared(cache: Path) -> None:
    clear_rooms(cache, older_than_days=30)
    assert listed(cache) == [("audits", 1, 10), ("self", 1, 50), ("tokenizers", 1, 7)]
