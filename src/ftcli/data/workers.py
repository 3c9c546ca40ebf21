"""Processes that tokenise chunks of rows side by side.

Each process holds one end of a pipe and writes its chunks' files itself. It ends when its parent does, however that ends: a
thread waits for the parent's death, since a process in the middle of a chunk reads no pipe.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.data.chunks import Row, Tally, Work, chunk_path, tokenise_chunk, write_chunk
from ftcli.errors import RunError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

POLL_SECONDS = 0.2
NUMBER_AND_ROWS = tuple[int, list[Row]]


def default_workers() -> int:
    """As many processes as there are cores to run them, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


@dataclass(frozen=True, slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection


def tokenise_in_processes(
    chunks: Iterable[NUMBER_AND_ROWS], work: Work, folder: Path, num_workers: int, on_progress: Callable[[Tally | None], None]
) -> None:
    """Tokenise chunks into their files under `folder`.

    Args:
        chunks: number of each chunk and its rows; read only as fast as processes are free.
        work: what a row becomes.
        folder: where the chunks' files go.
        num_workers: processes at most.
        on_progress: called with the tally of each chunk that is done, and with None while there is nothing to tell; when it
            raises, the processes are stopped and finished chunks stay.

    Raises:
        OSError: a chunk could not be written.
        RunError: a process died.
    """
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        for chunk in chunks:
            while not idle and len(busy) == num_workers:
                _receive(busy, idle, on_progress)
            worker = idle.pop() if idle else _start(work, folder)
            busy.append(worker)
            try:
                worker.connection.send(chunk)
            except BrokenPipeError:
                raise _death(worker) from None
        while busy:
            _receive(busy, idle, on_progress)
    finally:
        for worker in [*idle, *busy]:
            worker.connection.close()
            worker.process.terminate()
        for worker in [*idle, *busy]:
            worker.process.join()


def _start(work: Work, folder: Path) -> _Worker:
    # Spawned, not forked: the parent may hold threads of torch, and locks with them.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, folder), daemon=True)
    # Ctrl-C reaches the whole group; the mask is inherited, so that only the parent sees it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process, ours)


def _receive(busy: list[_Worker], idle: list[_Worker], on_progress: Callable[[Tally | None], None]) -> None:
    """Wait a moment for chunks to be done; their processes become idle."""
    ready = wait([worker.connection for worker in busy], timeout=POLL_SECONDS)
    for worker in [worker for worker in busy if worker.connection in ready]:
        try:
            answer = worker.connection.recv()
        except EOFError:
            raise _death(worker) from None
        if isinstance(answer, OSError):
            raise answer
        busy.remove(worker)
        idle.append(worker)
        on_progress(answer)
    if not ready:
        on_progress(None)


def _death(worker: _Worker) -> RunError:
    worker.process.join()
    code = worker.process.exitcode
    hint = "it was killed, perhaps for want of memory: set `data.workers` lower" if code == -signal.SIGKILL else None
    return RunError(f"a tokenising process died with exit code {code}", hint=hint)


def _serve(connection: Connection, work: Work, folder: Path) -> None:
    """Tokenise the chunks that come in until the pipe closes."""
    # Each process is one of many: threads of the tokenizer would only fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        try:
            number, rows = connection.recv()
        except EOFError:
            return
        arrays, tally = tokenise_chunk(rows, work)
        try:
            write_chunk(chunk_path(folder, number), arrays, tally)
        except OSError as error:
            connection.send(OSError(error.errno or errno.EIO, error.strerror or str(error), str(folder)))
            return
        connection.send(tally)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
