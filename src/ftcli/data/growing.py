"""A store whose source is tokenised in another thread while its first trees are trained on.

The thread does what is done anywhere for a source that the cache lacks, so that a run that is killed finds the finished chunks, and
the next one the complete store. What is there counts in examples: an order that asks for examples from front to back waits here.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftcli.data.cache import Build, find_or_build
from ftcli.data.chunks import Tally
from ftcli.data.store import NARROW, READ_TREES, WIDE, SourceReport, StoreWriter, TreeStore, read_meta, report_of
from ftcli.data.verdict import refuse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ftcli.data.settings import EvaluationSource, TrainSource

POLL_SECONDS = 0.2


class GrowingStore(TreeStore):
    """The trees of one source, as far as they are tokenised.

    Args:
        cache_folder: of all of ftcli's caches.
        build: the store and how to make it.
        entry: what the recipe says of the source.
    """

    def __init__(self, cache_folder: Path, build: Build, entry: TrainSource | EvaluationSource) -> None:
        self.folder = cache_folder
        self.entry = entry
        self.name = build.name
        self.role = entry.role
        self.loss_weight = getattr(entry, "loss_weight", 1.0)
        self._build = replace(build, on_growth=self._grow)
        self._token_dtype = NARROW if build.work.tokenizer.vocab_size <= np.iinfo(NARROW).max + 1 else WIDE
        self._changed = threading.Condition()
        self._counts: dict[str, int] = {}
        self._mapped_counts: dict[str, int] | None = None
        self._total = Tally()
        self._error: BaseException | None = None
        self._is_complete = self._is_mapped_whole = self._is_stopped = False
        self._describe()
        self._thread = threading.Thread(target=self._work, args=(cache_folder,), name=f"tokenise {build.name}", daemon=True)
        self._thread.start()

    @property
    def rows_read(self) -> int:
        """Rows that are tokenised and in their place."""
        return self._total.rows_read

    @property
    def is_complete(self) -> bool:
        """Whether the last row is tokenised, and what is said of the store says it of all."""
        return self._is_mapped_whole

    @property
    def longest(self) -> int:
        """What is to come may be as long as rows are let be."""
        return self._build.work.max_length

    def arrived(self, count: int, on_wait: Callable[[], None] = lambda: None) -> int:
        """How many examples there are, once there are `count`, or all of them.

        Raises:
            FtcliError: whatever stopped the tokenising.
        """
        with self._changed:
            while not self._is_complete and self._error is None and self._num_examples() < count:
                self._changed.wait(POLL_SECONDS)
                on_wait()
            if self._error is not None:
                raise self._error
            self._map_all()
            return len(self.example_lengths)

    def close(self) -> None:
        """Stop tokenising; the next run goes on from the finished chunks."""
        self._is_stopped = True
        self._thread.join()

    def _num_examples(self) -> int:
        """What may be read: where a tree or a block ends is known when the next one begins."""
        return max(0, (self._counts.get("blocks") or self._counts.get("trees", 0)) - 1)

    def _map_all(self) -> None:
        """Map what has come since the last time."""
        if self._mapped_counts is not None and self._mapped_counts == self._counts:
            return
        self._mapped_counts = dict(self._counts)
        # Where a tree ends is known when the next one begins.
        growing = {**self._counts, "lengths": max(0, self._counts.get("trees", 0) - 1)}
        self._map(self._token_dtype, None if self._is_complete else growing)
        self._is_mapped_whole = self._is_complete
        self._describe()

    def _describe(self) -> None:
        """Report what was read so far, with the lengths of the first trees, or all of it."""
        meta = read_meta(self.folder) if self._is_complete else None
        if meta is not None:
            self.report = replace(SourceReport.from_json(meta["report"]), name=self.name)
            return
        work = self._build.work
        lengths = self.lengths[:READ_TREES] if self._mapped_counts is not None else np.zeros(0, dtype=np.int32)
        self.report = report_of(
            self._total, lengths, name=self.name, format_kind=work.format.kind, on_overflow=work.policy, cache_key=self._build.key
        )

    def _work(self, cache_folder: Path) -> None:
        """What the thread does."""
        try:
            folder, _ = find_or_build(cache_folder, self._build, self._go_on)
        except _StoppedError:
            return
        except BaseException as error:
            # A thread's error would only be printed: it is raised where the run waits.
            self._tell(error, None)
            return
        self._tell(None, folder)

    def _go_on(self, done: int) -> None:
        if self._is_stopped:
            raise _StoppedError

    def _grow(self, writer: StoreWriter) -> None:
        total, work = writer.total, self._build.work
        if total.num_problems or total.num_overlong:
            # What a complete store would be refused for must not be trained on before.
            refuse(total, np.concatenate(writer.row_lengths), self.name, work, may_be_empty=True)
        with self._changed:
            self.folder = writer.folder
            self._counts, self._total = dict(writer.counts), copy.deepcopy(total)
            self._changed.notify_all()

    def _tell(self, error: BaseException | None, folder: Path | None) -> None:
        with self._changed:
            self._error = error
            if folder is not None:
                self.folder, self._is_complete, self._mapped_counts = folder, True, None
            self._changed.notify_all()


class FirstTrees(Sequence["NDArray[np.int64] | None"]):
    """`first_trees` of each store, as they are when they are asked for."""

    def __init__(self, stores: Sequence[TreeStore]) -> None:
        self._stores = stores

    def __len__(self) -> int:
        return len(self._stores)

    def __getitem__(self, index: Any) -> Any:
        return self._stores[index].first_trees


class _StoppedError(Exception):
    """The run has ended, and no more trees are wanted."""
