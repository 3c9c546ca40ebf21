"""A chunk: some thousand rows in a row, tokenised into flat arrays, and one file that holds them.

A chunk's file is complete or not there, and where it begins and ends depends on the rows alone; so a killed run goes on after
its last finished chunk, whatever number of processes it had.
Legend: ``N`` trees, ``T`` tokens, ``S`` segments, ``P`` spans of a chunk.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftcli.data.blocks import BLOCK, BlockCutter
from ftcli.data.overflow import Policy, fit
from ftcli.data.tokenise import Tokeniser, digest, num_targets
from ftcli.data.tree import SPAN, TokenTree
from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from ftcli.data.formats import Format
    from ftcli.models.tokenizer import Tokenizer

MAX_PROBLEMS = 10
MAX_LISTED = 20
CHUNK_ROWS = 2000
CHUNK_CHARS = 4_000_000

SEGMENT = np.dtype([("start", "<i4"), ("parent", "<i4")])
# Where the tree's tokens, segments, spans and bytes of labels begin, and what else is known of it. `digest` is shared by equal trees.
TREE = np.dtype(
    [("token", "<i8"), ("segment", "<i8"), ("span", "<i8"), ("label", "<i8"), ("num_bytes", "<i8"), ("row", "<i8"), ("digest", "<u8")]
)

Row = tuple[int, str, dict[str, Any]]
"""Index in its source, where it stands for people, and the row."""


@dataclass(frozen=True)
class Work:
    """All that decides what a row becomes."""

    format: Format
    tokenizer: Tokenizer
    max_length: int
    policy: Policy


@dataclass
class Tally:
    """What became of rows; counted per chunk and added up."""

    rows_read: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_bytes: int = 0
    num_overlong: int = 0
    overlong: list[tuple[str, int]] = field(default_factory=list)
    """(where, tokens) of the first rows longer than the maximum length."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows by the reason why they are not used."""
    num_without_stop: int = 0
    """Rows with a trained turn that has no token in it at which generation stops."""
    num_with_special: int = 0
    """Texts with special tokens written out within them."""
    first_target: str | None = None
    last_target: str | None = None
    """Text of the first and the last target of the first example."""
    problems: list[tuple[str, str, str | None]] = field(default_factory=list)
    num_problems: int = 0

    def add(self, other: Tally) -> None:
        """Count the rows that come after these."""
        for name in (
            "rows_read",
            "num_examples",
            "num_tokens",
            "num_targets",
            "num_bytes",
            "num_overlong",
            "num_without_stop",
            "num_with_special",
            "num_problems",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.overlong = [*self.overlong, *other.overlong][:MAX_LISTED]
        self.problems = [*self.problems, *other.problems][:MAX_PROBLEMS]
        self.dropped += other.dropped
        if self.first_target is None:
            self.first_target, self.last_target = other.first_target, other.last_target

    def add_problem(self, problem: Problem) -> None:
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append((problem.where, problem.what, problem.hint))

    @classmethod
    def from_json(cls, text: str) -> Tally:
        values = json.loads(text)
        values["dropped"] = Counter(values["dropped"])
        values["overlong"] = [(where, tokens) for where, tokens in values["overlong"]]
        values["problems"] = [(where, what, hint) for where, what, hint in values["problems"]]
        return cls(**values)


def problems_of(error: RequestError) -> list[Problem]:
    """The single things that are wrong, of an error that may be one itself."""
    return list(error.problems) or [Problem("", error.summary, error.hint)]


def chunks_of(rows: Iterable[Row], max_rows: int | None = None) -> Iterator[list[Row]]:
    """The rows in chunks of at most `max_rows`, cut earlier where their text is long."""
    limit = CHUNK_ROWS if max_rows is None else max_rows
    chunk: list[Row] = []
    num_chars = 0
    for row in rows:
        chunk.append(row)
        num_chars += sum(len(value) if isinstance(value, str) else len(repr(value)) for value in row[2].values())
        if len(chunk) == limit or num_chars >= CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


class RowTokeniser:
    """Rows become trees, and what became of each row is tallied."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.tokeniser = Tokeniser(work.tokenizer)
        self.tally = Tally()
        self.cutter = BlockCutter(work.max_length) if work.policy == "block" else None
        self.row_lengths: list[int] = []

    def trees(self, row: Row) -> list[TokenTree]:
        """The trees of one row; none where it is dropped or has a problem."""
        index, where, values = row
        self.tally.rows_read += 1
        try:
            example = self.tokeniser.encode(self.work.format.example(values, self.work.tokenizer, where), where, index)
        except RequestError as error:
            for problem in problems_of(error):
                self.tally.add_problem(problem)
            return []
        if not example.has_target():
            return self._drop("no target")
        self.tally.num_with_special += self.work.format.kind == "text" and self.tokeniser.has_special_within(example)
        length = example.longest_branch
        self.row_lengths.append(length)
        if length > self.work.max_length:
            self.tally.num_overlong += 1
            if len(self.tally.overlong) < MAX_LISTED:
                self.tally.overlong.append((where, length))
        trees = fit(example, self.work.max_length, self.work.policy) if self.cutter is None else self.cutter.trees(example)
        if not trees:
            return self._drop("too long")
        targets = sum(map(num_targets, trees))
        if targets == 0:
            return self._drop("no target")
        self.tally.num_without_stop += not example.every_turn_stops()
        self._count(trees, targets)
        return trees

    def _drop(self, reason: str) -> list[TokenTree]:
        self.tally.dropped[reason] += 1
        return []

    def _count(self, trees: list[TokenTree], targets: int) -> None:
        self.tally.num_examples += len(trees)
        self.tally.num_tokens += sum(map(len, trees))
        self.tally.num_targets += targets
        self.tally.num_bytes += sum(tree.num_bytes for tree in trees)
        if self.tally.first_target is None:
            self.tally.first_target = self._target_text(trees[0], 0)
            self.tally.last_target = self._target_text(trees[-1], -1)

    def _target_text(self, tree: TokenTree, which: int) -> str:
        """Text of the first (0) or the last (-1) target of `tree`, with the space that it may begin with; labels are one target."""
        if tree.labels is not None:
            return ", ".join(tree.labels)
        spans = tree.spans[(tree.spans["weight"] > 0) & ~tree.spans["is_prompt"]]
        place = max(1, int(spans["start"][0])) if which == 0 else int(spans["end"][-1]) - 1
        before, token_id = tree.tokens[place - 1 : place + 1].tolist()
        decode = self.work.tokenizer.decode
        return decode([before, token_id]).removeprefix(decode([before]))


def tokenise_chunk(rows: list[Row], work: Work) -> tuple[dict[str, NDArray[Any]], Tally]:
    """The rows' trees as flat arrays by name, and what became of the rows."""
    tokeniser = RowTokeniser(work)
    trees = [tree for row in rows for tree in tokeniser.trees(row)]
    heads = np.zeros(len(trees), dtype=TREE)
    labels = [write_labels(tree.labels) for tree in trees]
    sizes = [(len(tree), len(tree.starts), len(tree.spans), len(label)) for tree, label in zip(trees, labels, strict=True)]
    counts = np.array(sizes, dtype=np.int64).reshape(-1, 4)
    for column, name in enumerate(("token", "segment", "span", "label")):
        heads[name][1:] = np.cumsum(counts[:-1, column])
    heads["num_bytes"] = [tree.num_bytes for tree in trees]
    heads["row"] = [tree.row for tree in trees]
    heads["digest"] = [digest(tree) for tree in trees]
    segments = np.zeros(int(counts[:, 1].sum()), dtype=SEGMENT)
    segments["start"] = _joined([tree.starts for tree in trees], np.dtype(np.int32))
    segments["parent"] = _joined([tree.parents for tree in trees], np.dtype(np.int32))
    arrays = {
        "tokens": _joined([tree.tokens for tree in trees], np.dtype(np.int32)),
        "lengths": counts[:, 0].astype(np.int32),
        "trees": heads,
        "segments": segments,
        "spans": _joined([tree.spans for tree in trees], SPAN),
        "labels": np.frombuffer(b"".join(labels), dtype=np.uint8),
        "blocks": np.zeros(0, dtype=BLOCK) if tokeniser.cutter is None else tokeniser.cutter.blocks(),
        "row_lengths": np.array(tokeniser.row_lengths, dtype=np.int32),
    }
    return arrays, tokeniser.tally


def write_labels(labels: tuple[str, ...] | None) -> bytes:
    """Labels as bytes; none at all for a tree that has no labels, which is not the same as an empty list of them."""
    return b"" if labels is None else json.dumps(labels, ensure_ascii=False).encode("utf-8", "surrogatepass")


def read_labels(content: bytes) -> tuple[str, ...] | None:
    """What `write_labels` wrote."""
    return tuple(json.loads(content.decode("utf-8", "surrogatepass"))) if content else None


def _joined(parts: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The arrays in a row; all of them are of `dtype`. By their bytes, since numpy is slow to join thousands of records."""
    return np.frombuffer(b"".join(part.tobytes() for part in parts), dtype=dtype)


def chunk_path(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:06d}.npz"


def write_chunk(path: Path, arrays: dict[str, NDArray[Any]], tally: Tally) -> None:
    """Write a chunk's file; there is all of it under its name, or nothing."""
    # asdict takes a Counter apart into pairs and counts those
    text = json.dumps({**asdict(tally), "dropped": dict(tally.dropped)}, ensure_ascii=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, tally=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_chunk(path: Path) -> tuple[dict[str, NDArray[Any]], Tally]:
    """A chunk's arrays by name, and what became of its rows."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, Tally.from_json(arrays.pop("tally").tobytes().decode())


def read_finished(path: Path) -> Tally | None:
    """The tally of a chunk that an earlier run finished; None if there is none or its file is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                return None
        with np.load(path, allow_pickle=False) as arrays:
            return Tally.from_json(arrays["tally"].tobytes().decode())
    except (FileNotFoundError, zipfile.BadZipFile, EOFError, KeyError, ValueError):
        return None
