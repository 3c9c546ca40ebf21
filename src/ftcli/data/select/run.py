"""Choose from a large pool the rows nearest to a small task set, and write them as they were, with scores and a report.

The pool is read four times, a chunk in memory at a time: to learn what it is like, to score it, to find near copies among the best, and
to copy what was chosen. Kept beside the chunk are the places of the best rows and their MinHash minima. What is chosen depends on texts
and the seed, and not on the order of the pool.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ftcli.data.select.best import Best, Candidate, Spread
from ftcli.data.select.doubts import Evidence, doubts
from ftcli.data.select.importance import Bag, Importance, kl
from ftcli.data.select.near import near_copies
from ftcli.data.select.pool import Chunk, Pool
from ftcli.data.select.way import Random, Way
from ftcli.data.select.words import WordReader, digests_of
from ftcli.errors import DataError, Problem, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ftcli.data.prepare import Progress
    from ftcli.data.stats.overlap import HeldOut

WayName = Literal["perplexity", "ngrams", "embeddings", "random"]
WAYS: tuple[WayName, ...] = ("perplexity", "ngrams", "embeddings", "random")


@dataclass(frozen=True)
class Selection:
    """What to choose, and how."""

    pool: Pool
    gold: Pool
    """The task set."""
    count: int
    by: WayName = "perplexity"
    seed: int = 17
    model: str | None = None
    """Of `embeddings` the encoder, of `perplexity` the model of the domain."""
    general_model: str | None = None
    """Of `perplexity`."""
    neighbours: int = 10
    clusters: int | None = None
    max_tokens: int = 256
    device: str = "auto"
    min_near: float = 0.8
    """Of two rows that share so much of their character n-grams only the better is chosen; 1 keeps both."""
    evaluation: Pool | None = None
    """Rows that hold one of these rows are left out."""


@dataclass(frozen=True)
class SelectReport:
    """What was chosen."""

    by: str
    unit: str
    seed: int
    num_gold: int
    num_pool: int
    chosen: list[Candidate]
    """Best first."""
    left_out: dict[str, int]
    """Rows by the reason: copies of chosen rows, near copies of them, rows of the task set, rows that hold an evaluation row, rows
    without text."""
    sources: list[tuple[str, int, int]]
    """(name, rows, chosen)"""
    pool_scores: dict[str, float]
    chosen_scores: dict[str, float]
    kl_pool: float
    """Nats from the task set's n-grams to the pool's."""
    kl_chosen: float
    is_verbatim: bool
    """Rows are copied byte for byte; else written as JSON with the same values."""
    facts: dict[str, Any]
    warnings: list[str]
    """Reasons to doubt that the rows say anything of the task."""

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "score": self.unit,
            "seed": self.seed,
            "task_rows": self.num_gold,
            "pool_rows": self.num_pool,
            "chosen_rows": len(self.chosen),
            "left_out": self.left_out,
            "sources": [{"name": name, "rows": rows, "chosen": chosen} for name, rows, chosen in self.sources],
            "scores": {"pool": self.pool_scores, "chosen": self.chosen_scores},
            "kl": {"pool": self.kl_pool, "chosen": self.kl_chosen, "reduction": self.kl_pool - self.kl_chosen},
            "verbatim": self.is_verbatim,
            "warnings": self.warnings,
            **self.facts,
        }

    def lines(self) -> list[str]:
        """The report in words."""
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items() if count) or "none"
        lines = [f"{len(self.chosen):,} of {self.num_pool:,} rows by {self.by}, like {self.num_gold:,} rows of the task; seed {self.seed}"]
        lines += [f"left out: {left_out}", ""]
        lines += _table(["source", "rows", "chosen"], [[name, f"{rows:,}", f"{chosen:,}"] for name, rows, chosen in self.sources])
        lines += ["", f"score: {self.unit}"]
        shares = list(self.pool_scores)
        lines += _table(
            ["", *shares],
            [[name, *(f"{found[share]:.4g}" for share in shares)] for name, found in self._spreads() if found],
        )
        lines += ["", f"n-grams: the pool is {self.kl_pool:.3f} nats from the task, the chosen rows are {self.kl_chosen:.3f}"]
        if not self.is_verbatim:
            lines.append("rows are written as JSON with the same values: the pool is not all JSON Lines, nor all lines of text")
        return [*lines, *([""] if self.warnings else []), *(f"warning: {warning}" for warning in self.warnings)]

    def _spreads(self) -> list[tuple[str, dict[str, float]]]:
        return [("pool", self.pool_scores), ("chosen", self.chosen_scores)]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns in line, the first to the left."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [headings, *rows]
    ]


def select(selection: Selection, output: Path, progress: Progress | None = None) -> SelectReport:
    """Choose, and write the folder `output`: rows, scores.jsonl, report.json, report.txt.

    Raises:
        UsageError: the folder is there already, or the way lacks a model.
        DataError: a file cannot be read, or there is nothing to choose from or by.
        RequestError: a model cannot be loaded.
    """
    from ftcli.files import new_folder, write_json, write_text

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"`{output}` exists already", hint="choose another folder with -o, or remove this one")
    search = Search(selection, progress)
    search.score_pool()
    with new_folder(output) as folder:
        report = _write(search, folder)
        write_json(folder / "report.json", report.to_json())
        write_text(folder / "report.txt", "\n".join(report.lines()) + "\n")
    return report


class Search:
    """The pool as it is scored."""

    def __init__(self, selection: Selection, progress: Progress | None = None) -> None:
        from ftcli.data.stats.overlap import HeldOut

        self.selection = selection
        self._progress = progress
        self._total = selection.pool.num_lines() if progress is not None else None
        self.gold = [text for text in selection.gold.texts() if text.strip()]
        if not self.gold:
            raise DataError("there is nothing to choose by", [Problem("--like", "has no text")])
        self.way = way_of(selection)
        self.best: Best | None = None
        reader = WordReader()
        self.gold_words = reader.read(self.gold).ids
        self.different_words = np.unique(self.gold_words)
        self.known = np.zeros(len(self.different_words), dtype=bool)
        """Of the different words of the task set, which stand in the pool."""
        self.spread = Spread()
        self.left_out: Counter[str] = Counter()
        self.rows_of: Counter[int] = Counter()
        self.bag = Bag()
        self._gold_digests = np.unique(digests_of(self.gold))
        held_out = selection.evaluation
        self._held_out: HeldOut | None = None if held_out is None else HeldOut(held_out.texts())

    def score_pool(self) -> None:
        """Fit the way, and offer every row."""
        pool = self.selection.pool
        self.way.fit(self.gold, pool, self._tell)
        quotas = self.way.quotas(self.selection.count)
        self.best = Best(self.selection.count, quotas, has_spare=self.selection.min_near < 1)
        for chunk in pool.chunks():
            self._offer(chunk, self.best)
            self._tell(chunk.first + len(chunk), "score the pool")
        self._total = sum(self.rows_of.values())
        if not self._total:
            raise DataError("there is nothing to choose from", [Problem("", "the pool has no rows")])

    def _offer(self, chunk: Chunk, best: Best) -> None:
        self.rows_of[chunk.source] += len(chunk)
        words = self.bag.add(chunk.texts)
        self.known |= np.isin(self.different_words, words.ids)
        digests = digests_of(chunk.texts)
        kept = np.flatnonzero(self._allowed(chunk, digests))
        if not len(kept):
            return
        scores, groups = self.way.score([chunk.texts[place] for place in kept])
        finite = np.isfinite(scores)
        self.left_out["without text"] += int((~finite).sum())
        kept, scores, groups, digests = kept[finite], scores[finite], groups[finite], digests[kept][finite]
        self.spread.add(scores, digests)
        best.offer(scores + self.way.noise(digests), scores, groups, digests, chunk.first + kept, chunk.source)

    def chosen(self) -> tuple[list[Candidate], int, int]:
        """(the chosen rows, best first; equal texts that came again; near copies that would have been chosen)."""
        assert self.best is not None
        if self.selection.min_near >= 1:
            return *self.best.chosen(), 0
        candidates = self.best.candidates()
        self._total = len(candidates)
        near = near_copies(self.selection.pool, candidates, self.selection.min_near, self._tell)
        chosen, copies = self.best.chosen(near)
        last = chosen[-1].rank if len(chosen) == self.selection.count else (-np.inf, 0)
        return chosen, copies, sum(candidate.digest in near and candidate.rank > last for candidate in candidates)

    def _allowed(self, chunk: Chunk, digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """(n,) whether a row may be chosen at all; the reasons are counted."""
        has_text = np.fromiter((bool(text.strip()) for text in chunk.texts), dtype=bool, count=len(chunk))
        is_gold = np.isin(digests, self._gold_digests) & has_text
        holds = np.zeros(len(chunk), dtype=bool) if self._held_out is None else self._held_out.held_by(chunk.texts) & has_text & ~is_gold
        self.left_out["without text"] += int((~has_text).sum())
        self.left_out["rows of the task set"] += int(is_gold.sum())
        self.left_out["rows that hold an evaluation row"] += int(holds.sum())
        allowed: NDArray[np.bool_] = has_text & ~is_gold & ~holds
        return allowed

    def _tell(self, done: int, what: str) -> None:
        if self._progress is not None:
            self._progress.update(done, self._total, what)


def way_of(selection: Selection) -> Way:
    """The way that `by` names, with its models.

    Raises:
        UsageError: a model that it needs is not named, or one is named that it does not use.
        RequestError: a model cannot be loaded.
    """
    name, model, general = selection.by, selection.model, selection.general_model
    if name in ("ngrams", "random") and (model is not None or general is not None):
        raise UsageError(f"`--by {name}` uses no model", hint="leave out --model and --general-model, or use --by embeddings")
    if name == "ngrams":
        return Importance(selection.seed)
    if name == "random":
        return Random(selection.seed)
    from ftcli.data.select.models import TextModel

    if name == "embeddings":
        from ftcli.data.select.neighbours import Neighbours

        if model is None or general is not None:
            raise UsageError("`--by embeddings` needs one model", hint="--model builtin:tiny, the base's folder, or an encoder's")
        encoder = TextModel(model, max_tokens=selection.max_tokens, device=selection.device)
        return Neighbours(encoder.vectors, selection.seed, selection.neighbours, selection.clusters)
    from ftcli.data.select.difference import Difference

    if (model is None) != (general is None):
        hint = "--model DOMAIN_MODEL --general-model BASE; without both, n-gram models are made"
        raise UsageError("`--by perplexity` compares two models", hint=hint)
    if model is None or general is None:
        return Difference(selection.seed)
    domain, common = (
        TextModel(reference, max_tokens=selection.max_tokens, device=selection.device, has_head=True) for reference in (model, general)
    )
    return Difference(selection.seed, (domain.bits_per_byte, common.bits_per_byte))


def _write(search: Search, folder: Path) -> SelectReport:
    """Rows in the order of the pool, beside each its score."""
    from ftcli.files import json_text

    pool = search.selection.pool
    chosen, copies, near = search.chosen()
    if not chosen:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in search.left_out.items() if count)
        raise DataError("there is nothing to choose from", [Problem("", f"no row of the pool is left: {reasons}")])
    ranks = {candidate.index: (rank, candidate) for rank, candidate in enumerate(chosen, start=1)}
    names, bag, target = pool.labels(), Bag(), Bag()
    with (
        (folder / f"rows{pool.output_suffix}").open("w", encoding="utf-8", newline="") as rows,
        (folder / "scores.jsonl").open("w", encoding="utf-8") as scores,
    ):
        for done, row in enumerate(pool.chosen(sorted(ranks)), start=1):
            rank, candidate = ranks[row.index]
            raw = json.dumps(row.row, ensure_ascii=False, default=str) if row.raw is None else row.raw
            rows.write(raw if raw.endswith("\n") else raw + "\n")
            line = {"where": row.where, "source": names[candidate.source], "score": candidate.score, "rank": rank}
            scores.write(json_text({**line, "group": candidate.group}) + "\n")
            bag.add([row.text])
            if search._progress is not None and done % 1000 == 0:
                search._progress.update(done, len(chosen), "write the chosen rows")
    target.add(search.gold)
    taken = Counter(candidate.source for candidate in chosen)
    left_out = {"copies of chosen rows": copies, "near copies of chosen rows": near}
    left_out |= {reason: search.left_out[reason] for reason in sorted(search.left_out)}
    spread = Spread()
    spread.add(np.array([row.score for row in chosen]), np.array([row.digest for row in chosen], dtype=np.uint64))
    pool_scores, chosen_scores = search.spread.quantiles(), spread.quantiles()
    kl_pool, kl_chosen = kl(target.counts, search.bag.counts), kl(target.counts, search.bag.counts, bag.counts)
    evidence = Evidence(
        by=search.selection.by,
        reads_words=search.selection.by in ("ngrams", "perplexity") and search.selection.model is None,
        num_asked=search.selection.count,
        num_chosen=len(chosen),
        num_unlike=sum(candidate.score <= 0 for candidate in chosen),
        pool_scores=pool_scores,
        chosen_scores=chosen_scores,
        kl_pool=kl_pool,
        kl_chosen=kl_chosen,
        num_task_rows=len(search.gold),
        num_task_words=len(search.gold_words),
        num_different=len(search.different_words),
        num_known=int(search.known.sum()),
    )
    return SelectReport(
        by=search.selection.by,
        unit=search.way.unit,
        seed=search.selection.seed,
        num_gold=len(search.gold),
        num_pool=sum(search.rows_of.values()),
        chosen=chosen,
        left_out=left_out,
        sources=[(name, search.rows_of[place], taken[place]) for place, name in enumerate(names)],
        pool_scores=pool_scores,
        chosen_scores=chosen_scores,
        kl_pool=kl_pool,
        kl_chosen=kl_chosen,
        is_verbatim=pool.is_lines,
        facts=search.way.facts(),
        warnings=doubts(evidence),
    )
