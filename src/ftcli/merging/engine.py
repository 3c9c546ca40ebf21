"""Carries out a plan: every tensor read in pieces, computed in float32, rounded once, written at its place in files of known length.

Tensors are merged by a pool of threads (NumPy computes without the interpreter's lock). A journal names the tensors that are on the
disk; a merge that was killed goes on behind them and ends with the same bytes, since no tensor depends on another.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftcli.data.cache import default_cache_folder
from ftcli.data.file_hashes import sha256_of_file
from ftcli.errors import GateError, Problem, UsageError
from ftcli.files import said_when_disk_is_full
from ftcli.merging.global_trim import TrimmedTensor, global_limits
from ftcli.merging.hold import clear
from ftcli.merging.inputs import input_files
from ftcli.merging.layers import is_buffer
from ftcli.merging.numbers import Array, are_finite, fits, from_float32
from ftcli.merging.permuted import statistics_reader, tensor_reader
from ftcli.merging.pieces import Piece, row_ranges, rows_and_columns, sampled_rows
from ftcli.merging.plan import Input, Plan, TensorPlan
from ftcli.merging.randomness import Randomness
from ftcli.merging.readers import Reader, are_equal
from ftcli.merging.selection import Largest
from ftcli.merging.stored import OpenFiles

JOURNAL = "journal.jsonl"
_WRITTEN_BEFORE_SYNC = 2**28
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
Say = Callable[[int, int, str], None]


def working_folder(output: Path) -> Path:
    """Where a merge that is not finished keeps what it has."""
    return output.with_name(f".merging-{output.name}")


@dataclass
class _TensorInputs:
    """One tensor of every model, from their files (see `pieces.Inputs`)."""

    tensor: TensorPlan
    readers: list[Reader]
    base: Reader | None
    statistics: list[Reader]
    randomness: Randomness
    limits: tuple[Largest, ...]
    whole: tuple[Array, ...] = ()
    _only: Piece | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return rows_and_columns(self.tensor.shape)

    @property
    def num_models(self) -> int:
        return len(self.readers)

    def pieces(self) -> Iterator[Piece]:
        """A tensor of one piece is read once, however often it is looked at."""
        if self._only is not None:
            yield self._only
            return
        rows, columns = self.shape
        for index, (first, last) in enumerate(row_ranges(rows, columns)):
            piece = self.piece(index, first, last)
            if last - first == rows:
                self._only = piece
            yield piece

    def piece(self, index: int, first: int, last: int) -> Piece:
        return Piece(
            index,
            first * self.shape[1],
            tuple(reader.rows(first, last) for reader in self.readers),
            None if self.base is None else self.base.rows(first, last),
            tuple(reader.rows(first, last) for reader in self.statistics),
        )

    def sample(self) -> Piece | None:
        rows = sampled_rows(*self.shape)
        if rows is None:
            return None

        def of(reader: Reader) -> Array:
            return np.concatenate([reader.rows(row, row + 1) for row in rows])

        return Piece(0, 0, tuple(of(reader) for reader in self.readers), None if self.base is None else of(self.base))

    def whole_statistics(self) -> tuple[Array, ...]:
        return self.whole


@dataclass
class Journal:
    """The tensors that are on the disk, in a file of one line each."""

    path: Path
    fingerprint: str
    done: set[str] = field(default_factory=set)
    _pending: list[str] = field(default_factory=list)
    _flushed: set[str] = field(default_factory=set)
    _bytes: int = 0

    def read(self) -> None:
        """Take up what an earlier merge has written.

        Raises:
            UsageError: it was another merge.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the process was killed
        if entries and entries[0].get("fingerprint") != self.fingerprint:
            hint = "merge without --resume to begin anew"
            raise UsageError("the recipe or its models have changed since the merge was interrupted", hint=hint)
        self.done = {entry["done"] for entry in entries[1:]}

    @contextmanager
    def begun(self) -> Iterator[None]:
        """With the journal in its place, before anything that it would have to tell of."""
        if not self.path.is_file():
            self.path.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n", encoding="utf-8")
        yield

    def finished(self, name: str, num_bytes: int, sync: Callable[[], None]) -> None:
        """Note a tensor; it counts once its bytes are on the disk."""
        self._pending.append(name)
        self._bytes += num_bytes
        if self._bytes >= _WRITTEN_BEFORE_SYNC:
            self.flush(sync)

    def keep(self, tensors: Sequence[TensorPlan], sync: Callable[[], None]) -> None:
        """Note what is written when the merge has to stop, those tensors too that nobody has asked for yet."""
        self._pending = [tensor.name for tensor in tensors if tensor.name not in self._flushed]
        self.flush(sync)

    def flush(self, sync: Callable[[], None]) -> None:
        sync()
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"done": name}) + "\n" for name in self._pending))
            file.flush()
            os.fsync(file.fileno())
        self._flushed.update(self._pending)
        self._pending.clear()
        self._bytes = 0


@dataclass(frozen=True, slots=True)
class Carried:
    """What carrying out a plan took."""

    seconds: float
    num_tensors: int
    num_resumed: int
    """Tensors that were on the disk already."""
    num_unchanged: int
    """Tensors copied bit for bit, because no model changes them."""
    input_hashes: dict[str, str]
    """SHA-256 of every file that went in."""


def carry_out(plan: Plan, folder: Path, *, threads: int, resume: bool = False, say: Say | None = None) -> Carried:
    """Write the shards of a plan into `folder`, which is this merge's alone (see `hold`).

    Args:
        threads: tensors that are merged at once; the result does not depend on it.
        resume: go on with what is in the folder.

    Raises:
        GateError: a merged tensor has values that are not finite in its dtype.
        RunError: the disk is full.
    """
    started = time.perf_counter()
    keep_freed_memory()
    journal = Journal(folder / JOURNAL, plan.fingerprint())
    if resume:
        journal.read()
    else:
        clear(folder)
    with said_when_disk_is_full(folder), journal.begun(), OpenFiles() as files, _Writer(plan, folder) as writer:
        work = _Work(plan, files, writer)
        pending = sorted((t for t in plan.tensors if t.name not in journal.done), key=lambda tensor: -tensor.num_bytes)
        num_resumed = len(plan.tensors) - len(pending)
        work.find_limits(threads, bool(pending))
        hashes = _run(plan, work, journal, pending, threads, say)
        journal.flush(writer.sync)
    return Carried(time.perf_counter() - started, len(plan.tensors), num_resumed, work.num_unchanged, hashes)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next array of the same size.

    It would give the pages back whenever a piece is done, and have the kernel clear them for the next one: a third of the time of TIES.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 2**24)
            mallopt(_M_TRIM_THRESHOLD, 2**29)


def _run(plan: Plan, work: _Work, journal: Journal, pending: list[TensorPlan], threads: int, say: Say | None) -> dict[str, str]:
    """Merge the pending tensors and hash the inputs, largest first."""
    with ThreadPoolExecutor(threads) as pool:
        hashes = {name: pool.submit(_hash, path) for name, path in input_files(plan.recipe, plan.sources).items()}
        running = {pool.submit(work.merge, tensor): tensor for tensor in pending}
        try:
            _note_each(running, journal, work, say)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            with suppress(OSError):  # a full disk is what is told of
                journal.keep([tensor for future, tensor in running.items() if _is_written(future)], work.writer.sync)
            raise
        return {name: future.result() for name, future in hashes.items()}


def _is_written(future: Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _note_each(running: dict[Future[None], TensorPlan], journal: Journal, work: _Work, say: Say | None) -> None:
    """Write down every tensor when it is done, and say so."""
    total, done = sum(tensor.num_bytes for tensor in running.values()), 0
    for future in as_completed(running):
        tensor = running[future]
        future.result()
        done += tensor.num_bytes
        journal.finished(tensor.name, tensor.num_bytes, work.writer.sync)
        if say is not None:
            say(done, total, f"merge {tensor.name}")


def _hash(path: Path) -> str:
    """The name of a file in the hub's cache of large files is its hash already; others are known again by path, size, time and inode."""
    real = path.resolve()
    is_hash = real.parent.name == "blobs" and len(real.name) == 64
    return real.name if is_hash else sha256_of_file(path, default_cache_folder())


class _Writer:
    """The shards, open for writing at any place."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._descriptors: list[int] = []
        for shard in plan.shards:
            descriptor = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors.append(descriptor)
            if os.fstat(descriptor).st_size != shard.num_bytes:
                os.posix_fallocate(descriptor, 0, shard.num_bytes)
                os.ftruncate(descriptor, shard.num_bytes)
            os.pwrite(descriptor, shard.header, 0)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def write(self, shard: int, offset: int, values: NDArray[Any]) -> None:
        data = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptors[shard], data[done:], offset + done)

    def sync(self) -> None:
        for descriptor in self._descriptors:
            os.fdatasync(descriptor)


class _Work:
    """Merges single tensors."""

    def __init__(self, plan: Plan, files: OpenFiles, writer: _Writer) -> None:
        self.plan, self.files, self.writer = plan, files, writer
        self.num_unchanged = 0
        self._limits: dict[tuple[str, str], Largest] = {}
        self._lock = Lock()

    def merge(self, tensor: TensorPlan) -> None:
        """Compute one tensor and write it.

        Raises:
            GateError: it has values that are not finite in its dtype.
        """
        # what comes out infinite is refused by name, and not mumbled about by NumPy
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            self._merge(tensor)

    def _merge(self, tensor: TensorPlan) -> None:
        readers = [self._reader(tensor, item) for item in tensor.inputs]
        base = None if tensor.base is None else self._reader(tensor, tensor.base)
        compared = [*readers, *([] if base is None else [base])]
        rows, columns = rows_and_columns(tensor.shape)
        if tensor.is_copy or (base is not None and self.plan.recipe.method.keeps_base and self._is_unchanged(compared, rows, columns)):
            self._copy(tensor, base if base is not None else readers[0])
            return
        if (only := self._only_model(tensor, readers, rows, columns)) is not None:
            self._copy(tensor, only)
            return
        inputs = self._inputs(tensor, readers, base)
        merge = self.plan.recipe.method.merge(inputs, tensor.settings)
        for index, (first, last) in enumerate(row_ranges(rows, columns)):
            piece = next(inputs.pieces()) if last - first == rows else inputs.piece(index, first, last)
            merged = merge(piece)
            if not fits(merged, tensor.dtype):
                raise self._not_finite(tensor, piece)
            self._write(tensor, first * columns, from_float32(merged, tensor.dtype))

    def _only_model(self, tensor: TensorPlan, readers: list[Reader], rows: int, columns: int) -> Reader | None:
        """What a mean of models that have the same bits is; None where they differ, or no mean is asked for."""
        if not self.plan.recipe.method.is_mean(tensor.settings):
            return None
        weights = tensor.settings.get("weight", (1,) * len(readers))
        counted = [reader for reader, weight in zip(readers, weights, strict=True) if weight != 0]
        is_one = len(counted) == 1 or all(are_equal(counted, first, last) for first, last in row_ranges(rows, columns))
        return counted[0] if is_one else None

    def _is_unchanged(self, readers: list[Reader], rows: int, columns: int) -> bool:
        is_same = all(are_equal(readers, first, last) for first, last in row_ranges(rows, columns))
        with self._lock:
            self.num_unchanged += is_same
        return is_same

    def _copy(self, tensor: TensorPlan, reader: Reader) -> None:
        rows, columns = rows_and_columns(tensor.shape)
        for first, last in row_ranges(rows, columns):
            stored = reader.stored(first, last) if reader.dtype == tensor.dtype else None
            if stored is None:
                values = reader.rows(first, last)
                if not fits(values, tensor.dtype):
                    raise self._not_finite(tensor, None, is_own=not np.isfinite(values).all())
                stored = from_float32(values, tensor.dtype)
            elif not is_buffer(tensor.name) and not are_finite(stored, tensor.dtype):
                raise self._not_finite(tensor, None, is_own=True)
            self._write(tensor, first * columns, stored)

    def _write(self, tensor: TensorPlan, element: int, stored: NDArray[Any]) -> None:
        self.writer.write(tensor.shard, tensor.offset + element * stored.dtype.itemsize, stored)

    def _inputs(self, tensor: TensorPlan, readers: list[Reader], base: Reader | None) -> _TensorInputs:
        known = zip(tensor.inputs, tensor.statistics, strict=False)
        found = [(item, statistics) for item, statistics in known if statistics is not None]
        elementwise = self.plan.recipe.method.statistics == "elementwise"
        return _TensorInputs(
            tensor,
            readers,
            base,
            [statistics_reader(self.plan, tensor, item, statistics, self.files) for item, statistics in found] if elementwise else [],
            Randomness(self.plan.recipe.seed, tensor.name, tensor.labels),
            tuple(self._limits[tensor.name, label] for label in tensor.labels if (tensor.name, label) in self._limits),
            () if elementwise else tuple(self.files.whole(statistics) for _, statistics in found),
        )

    def _reader(self, tensor: TensorPlan, item: Input) -> Reader:
        return tensor_reader(self.plan, tensor, item, self.files)

    def _not_finite(self, tensor: TensorPlan, piece: Piece | None, *, is_own: bool = False) -> GateError:
        """The error that names the model whose numbers these are; of a copy (no piece) with `is_own` it is the model copied from."""
        guilty = [self.plan.sources[tensor.inputs[0].source].reference] if is_own else []
        if piece is not None:
            guilty = [label for label, model in zip(tensor.labels, piece.models, strict=True) if not np.isfinite(model).all()]
            if tensor.base is not None and piece.base is not None and not np.isfinite(piece.base).all():
                guilty.append(self.plan.sources[tensor.base.source].reference)
        why = f"`{guilty[0]}` has them already" if guilty else f"or are too large for {tensor.dtype}"
        return GateError("the merge is not finite", [Problem(tensor.name, f"values are NaN or infinite ({why})", "nothing was written")])

    def find_limits(self, threads: int, is_needed: bool) -> None:
        """For a trim over all tensors together: which changes of each model are kept in each tensor."""
        tensors = [tensor for tensor in self.plan.tensors if not tensor.is_copy and tensor.settings.get("scope") == "global"]
        if not tensors or not is_needed:
            return
        densities = {label: density for tensor in tensors for label, density in zip(tensor.labels, tensor.settings["density"], strict=True)}
        trimmed = [TrimmedTensor(tensor.name, tensor.labels, tensor.size, partial(self._magnitudes, tensor)) for tensor in tensors]
        with ThreadPoolExecutor(threads) as pool:
            self._limits = global_limits(trimmed, densities, lambda count, items: list(pool.map(count, items)))

    def _magnitudes(self, tensor: TensorPlan) -> Iterator[list[Array]]:
        base = None if tensor.base is None else self._reader(tensor, tensor.base)
        inputs = self._inputs(tensor, [self._reader(tensor, item) for item in tensor.inputs], base)
        for piece in inputs.pieces():
            yield [np.abs(delta) for delta in piece.deltas]
