"""The token trees of one source in memory-mapped files: any tree is there at once, and opening reads none of them.

A store is a folder: `meta.json`, and one flat array per file. Token ids take two bytes where the vocabulary allows it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftcli.data.blocks import BLOCK
from ftcli.data.chunks import SEGMENT, TREE, Tally, read_chunk, read_labels
from ftcli.data.tree import SPAN, TokenTree
from ftcli.units import format_count

if TYPE_CHECKING:
    from ftcli.data.settings import EvaluationSource, TrainSource

META = "meta.json"
READ_TREES = 1 << 16
WIDE, NARROW = np.dtype("<i4"), np.dtype("<u2")
FILES = ("tokens", "lengths", "trees", "segments", "spans", "labels", "blocks")
# Columns of a tree's head that say where something of it begins, and in which file.
HEAD_COLUMNS = {"token": "tokens", "segment": "segments", "span": "spans", "label": "labels"}


@dataclass(frozen=True)
class SourceReport:
    """What became of a source's rows."""

    name: str
    format: str
    """Kind of the format that read the rows."""
    on_overflow: str
    rows_read: int
    num_examples: int
    """Trees; a row that was split is several of them."""
    num_tokens: int
    num_targets: int
    """Tokens learnt as answers, prompts not counted."""
    num_bytes: int
    """UTF-8 bytes of the text of these targets."""
    dropped: dict[str, int]
    """Rows that are not used, by reason."""
    overlong: list[tuple[str, int]]
    """(where, tokens) of the first rows longer than the maximum length."""
    num_overlong: int
    length_p50: int
    """Tokens of a row along its longest branch, before anything is cut: half of the rows have at most so many."""
    length_p95: int
    length_max: int
    num_without_stop: int
    """Rows with a trained turn that has no token in it at which generation stops."""
    first_target: str | None
    """Text of the first target of the first example."""
    last_target: str | None
    """Text of the last target of the first example."""
    cache_key: str
    cache_hit: bool = False
    num_with_special: int = 0
    """Texts with special tokens written out within them."""

    @property
    def trained_ratio(self) -> float:
        """Share of the tokens that are targets, in 0..1."""
        return self.num_targets / self.num_tokens if self.num_tokens else 0.0

    def line(self) -> str:
        """The report in one line: what was read, what it became, and what was left out."""
        parts = [
            f"{self.name} ({self.format}): {format_count(self.rows_read)} rows, {format_count(self.num_examples)} examples",
            f"{format_count(self.num_tokens)} tokens, {self.trained_ratio:.0%} trained",
            f"lengths {self.length_p50} / {self.length_p95} / {self.length_max} (median, 95 %, longest)",
        ]
        if self.first_target is not None:
            parts.append(f"targets from {self.first_target!r} to {self.last_target!r}")
        if self.num_overlong:
            parts.append(f"{format_count(self.num_overlong)} rows too long (on_overflow: {self.on_overflow})")
        parts += [f"{format_count(count)} rows dropped: {reason}" for reason, count in sorted(self.dropped.items())]
        if self.num_without_stop:
            parts.append(f"{format_count(self.num_without_stop)} rows with an answer that does not stop")
        parts.append(f"cache {'hit' if self.cache_hit else 'written'} {self.cache_key[:12]}")
        return "; ".join(parts)

    def left_out(self) -> list[str]:
        """One line for each reason why rows are not used."""
        counts = [(reason, f"{format_count(count)} of {format_count(self.rows_read)}") for reason, count in sorted(self.dropped.items())]
        return [f"{share} rows of `{self.name}` left out: {reason}" for reason, share in counts]

    def with_special(self) -> list[str]:
        """A line about texts that the tokenizer does not read as plain text; none where there are none."""
        if not self.num_with_special:
            return []
        share = f"{format_count(self.num_with_special)} of {format_count(self.rows_read)}"
        hint = "where one ends a document, cut there and make rows of the parts"
        return [f"special tokens are written out in {share} texts of `{self.name}`, and are read as such: {hint}"]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "trained_ratio": self.trained_ratio}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SourceReport:
        known = {name: value for name, value in values.items() if name != "trained_ratio"}
        return cls(**{**known, "overlong": [(where, tokens) for where, tokens in known["overlong"]]})


def report_of(
    tally: Tally, row_lengths: NDArray[np.int32], *, name: str, format_kind: str, on_overflow: str, cache_key: str
) -> SourceReport:
    """The report of a source's rows, from what was counted over all its chunks."""
    # Nearest rank, so that a percentile is the length of some row.
    p50, p95, most = np.percentile(row_lengths, [50, 95, 100], method="inverted_cdf").tolist() if len(row_lengths) else (0, 0, 0)
    return SourceReport(
        name=name,
        format=format_kind,
        on_overflow=on_overflow,
        rows_read=tally.rows_read,
        num_examples=tally.num_examples,
        num_tokens=tally.num_tokens,
        num_targets=tally.num_targets,
        num_bytes=tally.num_bytes,
        dropped=dict(tally.dropped),
        overlong=tally.overlong,
        num_overlong=tally.num_overlong,
        length_p50=int(p50),
        length_p95=int(p95),
        length_max=int(most),
        num_without_stop=tally.num_without_stop,
        num_with_special=tally.num_with_special,
        first_target=tally.first_target,
        last_target=tally.last_target,
        cache_key=cache_key,
    )


class StoreWriter:
    """Puts chunks together as the arrays of a store, one after the other, without its meta.json.

    Memory is bounded by one chunk, but for four bytes per row of lengths.

    Args:
        folder: an empty folder.
        vocab_size: ids that the tokenizer can produce.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self.token_dtype = NARROW if vocab_size <= np.iinfo(NARROW).max + 1 else WIDE
        self.total = Tally()
        """What became of the rows so far."""
        self.num_chunks = 0
        self.counts = dict.fromkeys(FILES, 0)
        """Records in each file so far."""
        self.row_lengths: list[NDArray[np.int32]] = []
        """Of the rows of each chunk, in tokens, before anything was cut."""
        self._files: dict[str, IO[bytes]] = {name: (folder / f"{name}.bin").open("wb") for name in FILES}

    def add(self, path: Path) -> None:
        """Put the next chunk behind the ones before it."""
        arrays, tally = read_chunk(path)
        self.total.add(tally)
        self.row_lengths.append(arrays.pop("row_lengths"))
        for column, name in HEAD_COLUMNS.items():
            arrays["trees"][column] += self.counts[name]
        arrays["blocks"]["tree"] += self.counts["trees"]
        arrays["tokens"] = arrays["tokens"].astype(self.token_dtype)
        for name, file in self._files.items():
            file.write(arrays[name].tobytes())
            self.counts[name] += len(arrays[name])
        self.num_chunks += 1

    def flush(self) -> None:
        """Let others read what was added."""
        for file in self._files.values():
            file.flush()

    def finish(self) -> tuple[Tally, NDArray[np.int32]]:
        """What became of all rows, and their lengths in tokens; all arrays are on the disk."""
        # One head behind the last tells where its tokens, segments, spans and labels end.
        ends = tuple(self.counts[name] for name in HEAD_COLUMNS.values())
        self._files["trees"].write(np.array([(*ends, 0, -1, 0)], dtype=TREE).tobytes())
        if self.counts["blocks"]:
            self._files["blocks"].write(np.array([(self.counts["trees"], 0)], dtype=BLOCK).tobytes())
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return self.total, np.concatenate(self.row_lengths) if self.row_lengths else np.zeros(0, dtype=np.int32)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()


def write_meta(folder: Path, report: SourceReport, created: float) -> None:
    """Describe a store whose arrays are written; it counts as complete from here on."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.bin"))}
    token_bytes = sizes["tokens.bin"] // report.num_tokens if report.num_tokens else WIDE.itemsize
    meta = {"created": created, "token_bytes": token_bytes, "sizes": sizes, "report": report.to_json()}
    (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What meta.json says; None if the store is not there, or a file of it is not as long as it was written."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return meta if whole else None


class TreeStore:
    """The trees of one source, each made when it is asked for.

    Args:
        folder: a complete store.
        entry: what the recipe says of the source.
        name: what logs and metrics call it.
        cache_hit: whether it was there before.
    """

    rows_key: str = ""
    """What its rows are, by content and format; one that is still being written has none."""

    def __init__(self, folder: Path, entry: TrainSource | EvaluationSource, name: str, *, cache_hit: bool) -> None:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        self.folder = folder
        self.entry = entry
        self.name = name
        self.role: str = entry.role
        self.report = replace(SourceReport.from_json(meta["report"]), name=name, cache_hit=cache_hit)
        self.loss_weight: float = getattr(entry, "loss_weight", 1.0)
        self._map(NARROW if meta["token_bytes"] == NARROW.itemsize else WIDE)

    def _map(self, token_dtype: np.dtype[Any], counts: Mapping[str, int] | None = None) -> None:
        """Map the arrays; of a store that is being written only the first `counts` records of each file."""

        def mapped(name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
            return _mapped(self.folder / f"{name}.bin", dtype, None if counts is None else counts[name])

        self._tokens = mapped("tokens", token_dtype)
        self._heads = mapped("trees", TREE)
        self._segments = mapped("segments", SEGMENT)
        self._spans = mapped("spans", SPAN)
        self._labels = mapped("labels", np.dtype(np.uint8))
        self.lengths: NDArray[np.int32] = mapped("lengths", np.dtype("<i4"))
        """(N,) tokens of each tree."""
        blocks = mapped("blocks", BLOCK)
        self.first_trees: NDArray[np.int64] | None = blocks["tree"] if len(blocks) else None
        """(U + 1,) the first tree of each example of the order, with one more behind the last; None where an example is a tree."""
        self.example_lengths: NDArray[np.int32] = blocks["tokens"][:-1] if len(blocks) else self.lengths
        """(U,) tokens of each example of the order: of a block, or of a tree."""

    def arrived(self, count: int) -> int:
        """How many examples there are; a store that is still being written waits until there are `count`, if there will be so many."""
        return len(self.example_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest tree that there is or may come."""
        return int(self.lengths.max())

    def close(self) -> None:
        """Stop what is being done for the store; its trees can still be read."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def mean_tokens(self) -> float:
        """Tokens per example of the order."""
        return self.report.num_tokens / max(1, len(self.example_lengths))

    def digest_parts(self) -> Iterator[NDArray[np.uint64]]:
        """A number that equal trees share, of each tree, some thousand at a time: read as a file, so that it stays out of memory."""
        with (self.folder / "trees.bin").open("rb") as file:
            for first in range(0, len(self), READ_TREES):
                yield np.fromfile(file, dtype=TREE, count=min(READ_TREES, len(self) - first))["digest"]

    @property
    def rows(self) -> NDArray[np.int64]:
        """(N,) index of each tree's row in the source, counted from 0."""
        return self._heads["row"][: len(self)]

    def labels(self, index: int) -> tuple[str, ...] | None:
        """What the tree's row is said to be; None where it says nothing of the kind."""
        return read_labels(self._labels[self._heads[index]["label"] : self._heads[index + 1]["label"]].tobytes())

    def where(self, index: int) -> str:
        """What to call a tree when something is wrong with it."""
        return f"{self.name} row {int(self.rows[index]) + 1}"

    def tree(self, index: int) -> TokenTree:
        """One tree; the source's `loss_weight` is in the weights of its spans."""
        if not 0 <= index < len(self):
            raise IndexError(f"tree {index} is not in 0..{len(self) - 1}")
        head, end = self._heads[index], self._heads[index + 1]
        segments = self._segments[head["segment"] : end["segment"]]
        spans = self._spans[head["span"] : end["span"]].copy()
        spans["weight"] *= np.float32(self.loss_weight)
        return TokenTree(
            tokens=self._tokens[head["token"] : end["token"]].astype(np.int32),
            starts=segments["start"].astype(np.int32),
            parents=segments["parent"].astype(np.int32),
            spans=spans,
            num_bytes=int(head["num_bytes"]),
            row=int(head["row"]),
            labels=self.labels(index),
        )


def _mapped(path: Path, dtype: np.dtype[Any], count: int | None = None) -> NDArray[Any]:
    """The file's array, or its first `count` records, without reading it; what is empty cannot be mapped."""
    if count == 0 or path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=None if count is None else (count,)).view(np.ndarray)
