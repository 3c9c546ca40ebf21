"""The cache is complete or not there, never stale, and a stopped run goes on from its last finished chunk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ftcli.cli.cache import app
from ftcli.data import cache, chunks, workers
from ftcli.data.cache import clear, entries
from ftcli.data.prepare import Prepared, prepare
from ftcli.data.settings import Data
from ftcli.errors import InterruptedRun, RunError, UsageError
from ftcli.models.tokenizer import Tokenizer

MakeTokenizer = Callable[..., Tokenizer]
FILES = ("tokens.bin", "lengths.bin", "trees.bin", "segments.bin", "spans.bin")


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "orders.jsonl"
    write_rows(path, 60)
    return path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 10)


def write_rows(path: Path, count: int) -> None:
    lines = (
        json.dumps({"prompt": f"number {number} is", "completion": f" {number * 7919} or so" + " so" * (number % 5)})
        for number in range(count)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def data_of(path: Path, **given: Any) -> Data:
    given = {"holdout": 0.0, "workers": 1, "on_overflow": "drop"} | given
    return Data.model_validate({"train": [{"source": {"kind": "file", "path": str(path)}}], **given}, strict=False)


def run(path: Path, tokenizer: Tokenizer, cache_folder: Path, progress: Any = None, **given: Any) -> Prepared:
    return prepare(data_of(path, **given), tokenizer, cache_folder=cache_folder, progress=progress)


def contents(prepared: Prepared) -> list[bytes]:
    return [(prepared.train[0].folder / name).read_bytes() for name in FILES]


class StopAfter:
    """Progress that raises once so many rows are done."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def update(self, done: int, total: int | None, what: str) -> None:
        if done >= self.rows:
            raise InterruptedRun("stopped")


def count_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every chunk that is tokenised in this process from here on."""
    counted: list[int] = []

    def counting(rows: list[Any], work: Any) -> Any:
        counted.append(len(rows))
        return chunks.tokenise_chunk(rows, work)

    monkeypatch.setattr(cache, "tokenise_chunk", counting)
    return counted


def test_what_was_tokenised_once_is_found_again(rows: Path, make_tokenizer: MakeTokenizer, cache_folder: Path) -> None:
    first, second = (run(rows, make_tokenizer(), cache_folder).train[0] for _ in range(2))
    assert (first.report.cache_hit, second.report.cache_hit) == (False, True)
    assert first.report.cache_key == second.report.cache_key
    assert first.report.num_examples == len(second) == 60


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_run_goes_on_from_its_last_chunk(
    rows: Path, make_tokenizer: MakeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(rows, make_tokenizer(), tmp_path / "other")
    with pytest.raises(InterruptedRun):
        run(rows, make_tokenizer(), tmp_path / "cache", StopAfter(30))
    counted = count_chunks(monkeypatch)
    resumed = run(rows, make_tokenizer(), tmp_path / "cache")
    assert len(counted) == 3
    assert contents(resumed) == contents(whole)
    assert resumed.train[0].report == whole.train[0].report
    assert not list((tmp_path / "cache" / "trees").glob("*.partial"))


@pytest.mark.usefixtures("small_chunks")
def test_a_damaged_chunk_is_made_again(rows: Path, make_tokenizer: MakeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(rows, make_tokenizer(), tmp_path / "other")
    with pytest.raises(InterruptedRun):
        run(rows, make_tokenizer(), tmp_path / "cache", StopAfter(40))
    first, second, third, _ = sorted((tmp_path / "cache" / "trees").glob("*.partial/chunk-*.npz"))
    first.write_bytes(first.read_bytes()[:-7])
    second.write_bytes(b"")
    third.write_bytes(third.read_bytes().replace(b"\x01\x00", b"\x02\x00"))
    counted = count_chunks(monkeypatch)
    assert contents(run(rows, make_tokenizer(), tmp_path / "cache")) == contents(whole)
    assert len(counted) == 5


@pytest.mark.parametrize("name", [*FILES, "meta.json"])
def test_a_truncated_store_is_noticed_and_made_again(rows: Path, make_tokenizer: MakeTokenizer, cache_folder: Path, name: str) -> None:
    first = run(rows, make_tokenizer(), cache_folder)
    before = contents(first)
    path = first.train[0].folder / name
    path.write_bytes(path.read_bytes()[:-1])
    second = run(rows, make_tokenizer(), cache_folder)
    assert not second.train[0].report.cache_hit
    assert contents(second) == before


def test_the_key_depends_on_all_that_decides_the_trees(
    rows: Path, make_tokenizer: MakeTokenizer, cache_folder: Path, tmp_path: Path
) -> None:
    def key(tokenizer: Tokenizer | None = None, path: Path = rows, **given: Any) -> str:
        return run(path, tokenizer or make_tokenizer(), cache_folder, **given).train[0].report.cache_key

    other = tmp_path / "other.jsonl"
    write_rows(other, 61)
    same_bytes = tmp_path / "renamed.jsonl"
    same_bytes.write_bytes(rows.read_bytes())
    source = {"source": {"kind": "file", "path": str(rows)}}
    keys = [
        key(),
        key(path=other),
        key(make_tokenizer(template="{{ messages[0].content }}")),
        key(make_tokenizer(tokens=("<|im_start|>", "<|im_end|>", "<|more|>"))),
        key(make_tokenizer(bos=True)),
        key(max_length=200),
        key(on_overflow="split"),
        key(holdout=0.1),
        key(train=[source | {"limit": 50}]),
        key(train=[source | {"format": {"kind": "completion", "append_eos": False}}]),
    ]
    assert len(set(keys)) == len(keys)
    assert key(path=same_bytes) == key(train=[source | {"loss_weight": 0.5, "weight": 3.0, "name": "x", "role": "replay"}]) == keys[0]


def test_processes_make_the_same_bytes(make_tokenizer: MakeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 50)
    path = tmp_path / "rows.jsonl"
    write_rows(path, 420)
    alone = run(path, make_tokenizer(), tmp_path / "one")
    started = []
    start = workers._start

    def counting(*given: Any) -> Any:
        started.append(start(*given))
        return started[-1]

    monkeypatch.setattr(workers, "_start", counting)
    together = run(path, make_tokenizer(), tmp_path / "two", workers=2)
    assert len(started) == 2
    assert contents(alone) == contents(together)
    assert alone.train[0].report == together.train[0].report
    assert not any(worker.process.is_alive() for worker in started)


PROGRAM = """
import sys
import time
from pathlib import Path
from ftcli.data import chunks
from ftcli.data.prepare import prepare
from ftcli.data.settings import Data
from ftcli.models.tokenizer import load_tokenizer

class Tell:
    def update(self, done, total, what):
        print(done, flush=True)
        time.sleep(600 if done >= 400 else 0)  # so that the signal comes between two chunks of many, however late

chunks.CHUNK_ROWS = 100

if __name__ == "__main__":
    rows, tokenizer, cache = sys.argv[1:]
    train = [{"source": {"kind": "file", "path": rows}}]
    data = Data.model_validate({"train": train, "holdout": 0.0, "workers": 2, "on_overflow": "drop"}, strict=False)
    prepare(data, load_tokenizer(tokenizer), cache_folder=Path(cache), progress=Tell())
"""


def children_of(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts processes in /proc")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_killed_run_leaves_no_process_and_goes_on(
    make_tokenizer: MakeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    path, program, cache_folder = tmp_path / "rows.jsonl", tmp_path / "program.py", tmp_path / "cache"
    write_rows(path, 1500)
    program.write_text(PROGRAM, encoding="utf-8")
    tokenizer = make_tokenizer()
    process = subprocess.Popen(
        [sys.executable, program, path, tokenizer.folder, cache_folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    while int(process.stdout.readline()) < 400:
        pass
    children = children_of(process.pid)
    process.send_signal(number)
    process.communicate()
    deadline = time.monotonic() + 10
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) >= 2
    assert not any(map(is_running, children))
    finished = len(list(cache_folder.glob("trees/*.partial/chunk-*.npz")))
    assert 2 <= finished < 15
    counted = count_chunks(monkeypatch)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 100)
    resumed = run(path, tokenizer, cache_folder)
    assert len(counted) == 15 - finished
    assert contents(resumed) == contents(run(path, tokenizer, tmp_path / "other"))


def test_a_second_process_waits_for_the_first(
    rows: Path, make_tokenizer: MakeTokenizer, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = count_chunks(monkeypatch)
    found: list[Prepared] = []
    tokenizers = [make_tokenizer(), make_tokenizer()]  # not in the threads: it writes files, and half a file is another tokenizer
    threads = [threading.Thread(target=lambda own=own: found.append(run(rows, own, cache_folder))) for own in tokenizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 1
    assert sorted(prepared.train[0].report.cache_hit for prepared in found) == [False, True]


def test_a_full_disk_says_so_and_keeps_what_is_finished(
    rows: Path, make_tokenizer: MakeTokenizer, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 10)
    write = chunks.write_chunk

    def write_two(path: Path, *given: Any) -> None:
        if "chunk-000002" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *given)

    monkeypatch.setattr(cache, "write_chunk", write_two)
    with pytest.raises(RunError, match="the disk is full: `orders` cannot be tokenised"):
        run(rows, make_tokenizer(), cache_folder)
    assert len(list(cache_folder.glob("trees/*.partial/chunk-*.npz"))) == 2
    assert not list(cache_folder.glob("trees/*/meta.json"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_says_so(rows: Path, make_tokenizer: MakeTokenizer, cache_folder: Path) -> None:
    cache_folder.mkdir(mode=0o500)
    with pytest.raises(RunError, match="the cache cannot be written"):
        run(rows, make_tokenizer(), cache_folder)


def test_a_cache_in_place_of_a_file_says_so(rows: Path, make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match="the cache cannot be written"):
        run(rows, make_tokenizer(), tmp_path / "cache")


def test_entries_are_listed_and_cleared(rows: Path, make_tokenizer: MakeTokenizer, cache_folder: Path) -> None:
    assert entries(cache_folder) == []
    for max_length in (100, 200, 300):
        run(rows, make_tokenizer(), cache_folder, max_length=max_length)
    found = entries(cache_folder)
    assert [(entry.source, entry.rows, entry.is_complete) for entry in found] == [("orders", 60, True)] * 3
    old = found[1].key
    os.utime(cache_folder / "trees" / old / "meta.json", (0, 0))
    removed, _ = clear(cache_folder, older_than_days=30)
    assert [entry.key for entry in removed] == [old]
    with pytest.raises(UsageError, match="`nonsense` is no key"):
        clear(cache_folder, ["nonsense"])
    assert [entry.key for entry in clear(cache_folder, [found[0].key[:8]])[0]] == [found[0].key]
    assert [entry.key for entry in entries(cache_folder)] == [found[2].key]
    clear(cache_folder)
    assert list((cache_folder / "trees").iterdir()) == []


@pytest.mark.usefixtures("small_chunks")
def test_what_is_being_made_is_not_cleared(rows: Path, make_tokenizer: MakeTokenizer, cache_folder: Path) -> None:
    with pytest.raises(InterruptedRun):
        run(rows, make_tokenizer(), cache_folder, StopAfter(20))
    (entry,) = entries(cache_folder)
    assert not entry.is_complete
    with (cache_folder / "trees" / f"{entry.key}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert clear(cache_folder) == ([], [entry])
    assert clear(cache_folder) == ([entry], [])


def test_the_commands_list_and_clear(
    rows: Path, make_tokenizer: MakeTokenizer, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTCLI_CACHE", str(cache_folder))
    runner = CliRunner()
    assert "the cache is empty" in runner.invoke(app, []).stdout
    key = run(rows, make_tokenizer(), cache_folder).train[0].report.cache_key
    listed = runner.invoke(app, ["ls"]).stdout
    assert key[:12] in listed
    assert "orders" in listed
    report = json.loads(runner.invoke(app, ["ls", "--json"]).stdout)
    assert [entry["key"] for entry in report["entries"]] == [key]
    assert "removed 1 entry" in runner.invoke(app, ["clear", key[:6]]).stdout
    assert json.loads(runner.invoke(app, ["--json"]).stdout)["entries"] == []
