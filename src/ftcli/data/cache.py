"""The cache of tokenised sources: content-addressed, so that it is never stale, and written so that a killed run goes on.

`trees/KEY/` is a complete store, `trees/KEY.partial/` holds the finished chunks of one that is not, and `trees/KEY.lock` is
held by the process that builds or removes it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.chunks import MAX_PROBLEMS, Row, Tally, Work, chunk_path, chunks_of, read_finished, tokenise_chunk, write_chunk
from ftcli.data.store import META, StoreWriter, read_meta, report_of, write_meta
from ftcli.data.verdict import refuse
from ftcli.errors import DataError, Problem, RunError, UsageError

if TYPE_CHECKING:
    from ftcli.data.formats import Format

# Part of every key. Raise it when the same rows and settings give other trees than before, or the files another shape.
CODE_VERSION = 3
KEY_LENGTH = 32
LOCK_POLL_SECONDS = 0.2


def default_cache_folder() -> Path:
    """$FTCLI_CACHE, or ~/.cache/ftcli."""
    return Path(os.environ.get("FTCLI_CACHE") or "~/.cache/ftcli").expanduser()


Division = tuple[str, float] | tuple[str, float, int | None]
"""(side, share held out), and of how many rows, where it is not of all that are taken."""


def key_of_rows(source_fingerprint: str, layout: Format, *, limit: int | None, holdout: Division | None) -> str:
    """What the rows of a source are, by content and format, whatever they are called and however they are tokenised."""
    content = {"source": source_fingerprint, "format": layout.model_dump(mode="json"), "limit": limit, "holdout": holdout}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def key_of_source(source_fingerprint: str, work: Work, *, limit: int | None, holdout: Division | None) -> str:
    """The name of a store: equal only where everything that its trees depend on is equal."""
    tokenizer = work.tokenizer
    content = {
        "code": CODE_VERSION,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "source": source_fingerprint,
        "format": work.format.model_dump(mode="json"),
        "tokenizer": [tokenizer.fingerprint, tokenizer.bos_id, list(tokenizer.stop_ids), getattr(tokenizer, "adds_bos", None)],
        "max_length": work.max_length,
        "on_overflow": work.policy,
        "limit": limit,
        "holdout": holdout,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True)
class Build:
    """What to make where the cache has no store."""

    key: str
    name: str
    work: Work
    rows: Callable[[], Iterable[Row]]
    num_workers: int
    may_be_empty: bool = False
    """A store without trees is no error: rows held out may all be dropped."""
    on_growth: Callable[[StoreWriter], None] = lambda writer: None
    """Called whenever chunks were put behind the ones before them."""


def find_or_build(cache_folder: Path, build: Build, on_progress: Callable[[int], None]) -> tuple[Path, bool]:
    """The folder of a complete store, and whether it was there before.

    Two processes that want the same store do not meet: the second waits and finds it.

    Args:
        cache_folder: of all of ftcli's caches.
        build: the store and how to make it.
        on_progress: called with the rows done, often enough to stop the work by raising.

    Raises:
        DataError: rows are wrong, or longer than is allowed.
        RunError: the store cannot be written.
    """
    trees = cache_folder / "trees"
    folder = trees / build.key
    with _writing(cache_folder, build.name):
        if read_meta(folder) is not None:
            _mark_used(folder)
            return folder, True
        trees.mkdir(parents=True, exist_ok=True)
        with _locked(trees / f"{build.key}.lock", lambda: on_progress(0)):
            if read_meta(folder) is not None:
                return folder, True
            shutil.rmtree(folder, ignore_errors=True)
            _build(folder, build, on_progress)
    return folder, False


def _mark_used(folder: Path) -> None:
    """The time of meta.json's last change is when the store was last used; a cache that cannot be written is used all the same."""
    try:
        os.utime(folder / META)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


@contextmanager
def _writing(cache_folder: Path, name: str) -> Iterator[None]:
    """A full or read-only disk becomes an error that says what to do; what is finished stays."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = (
                f"free space under `{cache_folder}` (`ftcli cache ls`, `ftcli cache clear`) or set FTCLI_CACHE to another disk; "
                "finished chunks are kept, the same command goes on from them"
            )
            raise RunError(f"the disk is full: `{name}` cannot be tokenised", hint=hint) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            where = error.filename or cache_folder
            raise RunError(
                f"the cache cannot be written: `{where}` ({error.strerror})", hint="set FTCLI_CACHE to a folder of your own"
            ) from error
        raise


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file alone; wait for another process that holds it."""
    import fcntl

    while True:
        with path.open("wb") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    on_wait()
                    time.sleep(LOCK_POLL_SECONDS)
            # Whoever held it may have removed it: then this is a lock on a file that nobody else can find.
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue
            yield
            return


def _build(folder: Path, build: Build, on_progress: Callable[[int], None]) -> None:
    """Tokenise the rows chunk by chunk, put the chunks together, and give the folder its final name."""
    partial = folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    for leftover in partial.glob("*.tmp"):
        leftover.unlink(missing_ok=True)
    whole = partial / "store"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    try:
        with StoreWriter(whole, build.work.tokenizer.vocab_size) as writer:
            _tokenise(partial, build, writer, on_progress)
            tally, row_lengths = writer.finish()
        refuse(tally, row_lengths, build.name, build.work, may_be_empty=build.may_be_empty)
    except DataError:
        # The next attempt has other data or settings, and so another key.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    report = report_of(
        tally,
        row_lengths,
        name=build.name,
        format_kind=build.work.format.kind,
        on_overflow=build.work.policy,
        cache_key=build.key,
    )
    write_meta(whole, report, created=time.time())
    whole.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)


def _tokenise(partial: Path, build: Build, writer: StoreWriter, on_progress: Callable[[int], None]) -> None:
    """Write the chunks that are not there yet, and put each behind the one before it as soon as that is there.

    Reading stops early where rows are wrong: the first problems tell enough.
    """
    from ftcli.data.workers import tokenise_in_processes

    chunks = enumerate(chunks_of(build.rows()))
    first, second = next(chunks, None), next(chunks, None)
    done, num_chunks, num_problems = 0, 0, 0

    def count(tally: Tally | None) -> None:
        nonlocal done, num_problems
        if tally is not None:
            done += tally.rows_read
            num_problems += tally.num_problems
            put_together()
        on_progress(done)

    def put_together() -> None:
        before = writer.num_chunks
        while writer.num_chunks < num_chunks and chunk_path(partial, writer.num_chunks).exists():
            writer.add(chunk_path(partial, writer.num_chunks))
        if writer.num_chunks > before:
            writer.flush()
            build.on_growth(writer)

    def missing() -> Iterator[tuple[int, list[Row]]]:
        nonlocal num_chunks
        for number, rows in _chained(first, second, chunks):
            if num_problems >= MAX_PROBLEMS:
                return
            finished = read_finished(chunk_path(partial, number))
            if finished is None:
                # What is there is damaged, and must not be taken for a finished chunk.
                chunk_path(partial, number).unlink(missing_ok=True)
            num_chunks = number + 1
            if finished is None:
                yield number, rows
            else:
                count(finished)

    # Starting a process takes as long as tokenising a small source.
    if second is None or build.num_workers == 1:
        for number, rows in missing():
            arrays, tally = tokenise_chunk(rows, build.work)
            write_chunk(chunk_path(partial, number), arrays, tally)
            count(tally)
    else:
        tokenise_in_processes(missing(), build.work, partial, build.num_workers, count)


def _chained(
    first: tuple[int, list[Row]] | None, second: tuple[int, list[Row]] | None, others: Iterator[tuple[int, list[Row]]]
) -> Iterator[tuple[int, list[Row]]]:
    yield from (chunk for chunk in (first, second) if chunk is not None)
    yield from others


@dataclass(frozen=True)
class CacheEntry:
    """One store of the cache, or the finished chunks of one that is not complete."""

    key: str
    is_complete: bool
    num_bytes: int
    created: float
    """Seconds since 1970."""
    last_used: float
    """Seconds since 1970."""
    source: str | None = None
    rows: int | None = None
    tokens: int | None = None


def entries(cache_folder: Path) -> list[CacheEntry]:
    """Everything in the cache, the last used first."""
    trees = cache_folder / "trees"
    folders = [folder for folder in trees.iterdir() if folder.is_dir()] if trees.is_dir() else []
    return sorted(map(_entry, folders), key=lambda entry: (-entry.last_used, entry.key))


def _entry(folder: Path) -> CacheEntry:
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    meta = read_meta(folder)
    changed = folder.stat().st_mtime
    if meta is None:
        return CacheEntry(folder.name.removesuffix(".partial"), False, num_bytes, changed, changed)
    report: dict[str, Any] = meta["report"]
    used = (folder / META).stat().st_mtime
    return CacheEntry(folder.name, True, num_bytes, meta["created"], used, report["name"], report["rows_read"], report["num_tokens"])


def clear(cache_folder: Path, keys: Iterable[str] = (), older_than_days: float | None = None) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove entries from the cache.

    Args:
        cache_folder: of all of ftcli's caches.
        keys: keys or beginnings of keys; none means every entry.
        older_than_days: only entries that were not used for so long.

    Returns:
        (removed, left alone because another process is building them).

    Raises:
        UsageError: a key is not in the cache.
    """
    import fcntl

    found, wanted = entries(cache_folder), list(keys)
    unknown = [key for key in wanted if not any(entry.key.startswith(key) for entry in found)]
    if unknown:
        raise UsageError(
            "not in the cache", [Problem("KEY", f"`{key}` is no key, nor the beginning of one", "see `ftcli cache ls`") for key in unknown]
        )
    chosen = [entry for entry in found if not wanted or any(entry.key.startswith(key) for key in wanted)]
    if older_than_days is not None:
        chosen = [entry for entry in chosen if time.time() - entry.last_used > older_than_days * 86400]
    removed, busy = [], []
    for entry in chosen:
        folder, lock = cache_folder / "trees" / entry.key, cache_folder / "trees" / f"{entry.key}.lock"
        with lock.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy.append(entry)
                continue
            # A damaged store is not complete either, and stands under its final name.
            for leftover in (folder, folder.with_suffix(".partial")):
                shutil.rmtree(leftover, ignore_errors=True)
            lock.unlink(missing_ok=True)
            removed.append(entry)
    return removed, busy
