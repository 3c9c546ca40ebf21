"""What a data set is made of, in one reading: lengths, repeats, languages, tokens per byte, overlap with evaluation rows.

A chunk of rows is in memory at a time; of a row, some 400 bytes are kept to find what repeats.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ftcli.data.select.pool import Pool
from ftcli.data.stats.languages import language_finder, script_of
from ftcli.data.stats.near import RepeatFinder, Repeats
from ftcli.data.stats.overlap import HeldOut
from ftcli.errors import DataError, Problem

if TYPE_CHECKING:
    from ftcli.data.prepare import Progress
    from ftcli.models.tokenizer import Tokenizer

SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
EXACT_BELOW = 10_000
TOKENISED_AT_ONCE = 256
MAX_LISTED = 20


@dataclass
class Lengths:
    """How long texts are: exact up to `EXACT_BELOW`, above it to three digits, so that memory has a bound."""

    counts: Counter[int] = field(default_factory=Counter)
    total: int = 0
    longest: int = 0

    def add(self, lengths: Sequence[int]) -> None:
        self.total += sum(lengths)
        self.longest = max(self.longest, *lengths)
        self.counts.update(map(_rounded, lengths))

    @property
    def num_texts(self) -> int:
        return sum(self.counts.values())

    def quantiles(self) -> list[int]:
        """The length that each of `SHARES` of the texts have at most."""
        values = sorted(self.counts)
        reached = list(accumulate(self.counts[value] for value in values))
        return [values[bisect_left(reached, math.ceil(share * reached[-1]))] for share in SHARES]

    def to_json(self) -> dict[str, Any]:
        named = {f"{share:.0%}": value for share, value in zip(SHARES, self.quantiles(), strict=True)}
        return {"total": self.total, "mean": self.total / max(1, self.num_texts), **named, "longest": self.longest}


def _rounded(length: int) -> int:
    if length < EXACT_BELOW:
        return length
    unit = int(10 ** (len(str(length)) - 3))
    return length // unit * unit


@dataclass(frozen=True)
class DataStats:
    """What was measured."""

    sources: list[tuple[str, int]]
    """(name, rows)"""
    num_empty: int
    num_bytes: int
    characters: Lengths
    tokens: Lengths | None
    tokenizer: str | None
    repeats: Repeats
    languages: Counter[str]
    """Rows by language, or by script."""
    are_languages: bool
    """False where only scripts are told."""
    overlap: list[tuple[str, int, int, list[tuple[str, str]]]]
    """(name, rows, rows found, the first (evaluation row, place it was found)) of each evaluation set."""

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows in self.sources)

    @property
    def tokens_per_byte(self) -> float | None:
        return None if self.tokens is None or not self.num_bytes else self.tokens.total / self.num_bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.num_rows,
            "sources": [{"name": name, "rows": rows} for name, rows in self.sources],
            "empty": self.num_empty,
            "bytes": self.num_bytes,
            "characters": self.characters.to_json(),
            "tokens": None if self.tokens is None else self.tokens.to_json(),
            "tokenizer": self.tokenizer,
            "tokens_per_byte": self.tokens_per_byte,
            "repeats": {"exact": self.repeats.exact, "same_words": self.repeats.same_words, "near": self.repeats.near},
            "languages" if self.are_languages else "scripts": dict(self.languages.most_common()),
            "overlap": [
                {"name": name, "rows": rows, "found": found, "first": [{"row": row, "in": where} for row, where in places]}
                for name, rows, found, places in self.overlap
            ],
        }


@dataclass
class _Evaluation:
    """An evaluation set, and where its rows were found."""

    name: str
    wheres: list[str]
    held_out: HeldOut
    found: dict[int, str] = field(default_factory=dict)

    def look(self, texts: Sequence[str], wheres: Sequence[str]) -> None:
        for where, rows in zip(wheres, self.held_out.find(texts), strict=True):
            for row in rows:
                self.found.setdefault(row, where)

    def result(self) -> tuple[str, int, int, list[tuple[str, str]]]:
        first = [(self.wheres[row], where) for row, where in sorted(self.found.items())[:MAX_LISTED]]
        return self.name, len(self.wheres), len(self.found), first


def measure(
    pool: Pool,
    *,
    tokenizer: Tokenizer | None = None,
    tells_languages: bool = False,
    finds_near: bool = True,
    evaluation: Sequence[Pool] = (),
    progress: Progress | None = None,
) -> DataStats:
    """Read every row of `pool` once.

    Args:
        tells_languages: languages instead of scripts; needs an extra.
        evaluation: sets whose rows are looked for in the pool.

    Raises:
        DataError: a file cannot be read, or has no rows.
        MissingExtraError: languages are asked for without what tells them.
    """
    name_of: Callable[[str], str] = language_finder() if tells_languages else script_of
    sets = [_read_evaluation(one) for one in evaluation]
    finder = RepeatFinder(finds_near=finds_near)
    characters, tokens = Lengths(), Lengths()
    languages: Counter[str] = Counter()
    rows: Counter[int] = Counter()
    num_empty = num_bytes = 0
    total = pool.num_lines() if progress is not None else None
    for chunk in pool.chunks():
        rows[chunk.source] += len(chunk)
        num_empty += sum(not text.strip() for text in chunk.texts)
        num_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in chunk.texts)
        characters.add([len(text) for text in chunk.texts])
        if tokenizer is not None:
            tokens.add(_token_counts(tokenizer, chunk.texts))
        languages.update(name_of(text) for text in chunk.texts if text.strip())
        finder.add(chunk.texts)
        for one in sets:
            one.look(chunk.texts, chunk.wheres)
        if progress is not None:
            progress.update(chunk.first + len(chunk), total, "read rows")
    if not rows:
        raise DataError("there is nothing to measure", [Problem("", "the files have no rows")])
    return DataStats(
        sources=[(name, rows[place]) for place, name in enumerate(pool.labels())],
        num_empty=num_empty,
        num_bytes=num_bytes,
        characters=characters,
        tokens=None if tokenizer is None else tokens,
        tokenizer=None if tokenizer is None else str(tokenizer.folder),
        repeats=finder.found(),
        languages=languages,
        are_languages=tells_languages,
        overlap=[one.result() for one in sets],
    )


def _read_evaluation(pool: Pool) -> _Evaluation:
    rows = [(where, pool.text(row, where)) for _, where, row in pool.rows()]
    return _Evaluation(" + ".join(pool.labels()), [where for where, _ in rows], HeldOut([text for _, text in rows]))


def _token_counts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, without those that a model puts around it; some hundred texts at once, whose offsets take memory."""
    counts: list[int] = []
    for start in range(0, len(texts), TOKENISED_AT_ONCE):
        part = list(texts[start : start + TOKENISED_AT_ONCE])
        counts += [len(encoding.ids) for encoding in tokenizer.backend.encode_batch_fast(part, add_special_tokens=False)]
    return counts
