"""From the recipe's `data` to token trees: `prepare` makes or finds all of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ftcli.data.formats.detect import LANGUAGE_FORMATS
from ftcli.data.source_plan import Part, Plan, Problems, format_of, named_sources, plan_source
from ftcli.errors import DataError

if TYPE_CHECKING:
    from ftcli.data.audit import AuditReport
    from ftcli.data.cache import Division
    from ftcli.data.chunks import Row
    from ftcli.data.example import Example
    from ftcli.data.holdout import HeldOut
    from ftcli.data.settings import Data, EvaluationSource, TrainSource
    from ftcli.data.sources import Source
    from ftcli.data.store import TreeStore
    from ftcli.models.tokenizer import Tokenizer

ROWS_AT_ONCE = 1 << 16
MIN_ARRIVED = 8192  # examples that are there before a run begins: proofs and methods look at the first ones


class Progress(Protocol):
    """Is told how far long work has come, several times a second; it may raise to stop it."""

    def update(self, done: int, total: int | None, what: str) -> None:
        """`done` of `total` rows, or of an unknown number; `what` is done, such as "tokenise orders"."""
        ...


@dataclass(frozen=True)
class Prepared:
    """All data of a run, as token trees."""

    train: list[TreeStore]
    evaluation: list[TreeStore]
    """As the recipe lists them, or the rows held out of the training source."""
    audit: AuditReport
    notes: tuple[str, ...]
    """What was decided that the recipe does not say, what was left out, and what repeats: one line each."""

    def to_json(self) -> dict[str, Any]:
        """For the manifest and for `--json`."""
        return {
            "train": [{"role": store.role, **store.report.to_json()} for store in self.train],
            "evaluation": [{"role": store.role, **store.report.to_json()} for store in self.evaluation],
            "audit": self.audit.to_json(),
            "notes": list(self.notes),
        }


def prepare(
    data: Data,
    tokenizer: Tokenizer,
    *,
    cache_folder: Path,
    progress: Progress | None = None,
    first_rows: int | None = None,
    formats: frozenset[str] = LANGUAGE_FORMATS,
    may_grow: bool = False,
) -> Prepared:
    """The token trees of all sources, tokenised where the cache does not have them.

    Args:
        data: the recipe's `data`.
        tokenizer: of the base model, with the template in use.
        cache_folder: of all of ftcli's caches.
        progress: is told how far tokenising has come.
        first_rows: take only so many rows of every source.
        formats: kinds of the formats that the objective can learn from.
        may_grow: with mixture `stream`, training sources that the cache lacks are tokenised on after this returns.

    Raises:
        DataError: anything about any source is wrong.
        RunError: the cache cannot be written.
    """
    from ftcli.data.kept_audit import kept_audit

    problems = Problems()
    own_holdout = data.held_out()
    if own_holdout is not None:
        data = data.model_copy(update={"evaluation": (own_holdout,)})
    builder = _Builder(data, tokenizer, cache_folder, progress, may_grow, first_rows)
    plans: list[Plan] = []
    for source in named_sources(data, problems):
        if source.entry is own_holdout and problems.are_found:
            continue  # its rows are those of the training source, which has said what is wrong with them
        with problems.collecting():
            plans.append(plan_source(source, data, tokenizer, first_rows, formats))
    problems.raise_any()
    stores: dict[Part, list[TreeStore]] = {"train": [], "evaluation": []}
    for plan in plans:
        if plan.source.entry is own_holdout and problems.are_found:
            continue
        with problems.collecting():
            stores[plan.source.part].append(builder.store(plan))
    problems.raise_any()
    # Of few rows none is held out.
    train, evaluation = stores["train"], [store for store in stores["evaluation"] if len(store)]
    notes = [note for plan in plans if plan.source.entry is not own_holdout for note in plan.notes()]
    notes += [_holdout_note(store, train) for store in stores["evaluation"] if _holdout(store.entry) is not None]
    growing = builder.await_first(train)
    notes += [f"`{store.name}` is tokenised while it is trained on: what repeats in it is not looked for" for store in growing]
    there = [store for store in train if store not in growing]
    notes += [note for store in (*there, *evaluation) for note in (*store.report.left_out(), *store.report.with_special())]
    blocks = [(store.name, len(store.example_lengths)) for store in there if store.first_trees is not None]
    notes += [f"`{name}` is {count} blocks of {data.max_length} tokens" for name, count in blocks]
    found = kept_audit(cache_folder, there, evaluation)
    # A source that is trained and evaluated on would be told of twice.
    return Prepared(train, evaluation, found, tuple(dict.fromkeys([*notes, *found.lines()])))


def examples_of(store: TreeStore, tokenizer: Tokenizer, limit: int | None = None) -> Iterator[tuple[str, Example]]:
    """(where, example) of the first `limit` rows that `store` has trees of, in their order: for generating answers."""
    import numpy as np

    settings = store.entry.format or format_of(store.entry, frozenset({store.report.format}))
    wanted: dict[int, None] = {}
    for first in range(0, len(store), ROWS_AT_ONCE):
        wanted.update(dict.fromkeys(np.asarray(store.rows[first : first + ROWS_AT_ONCE]).tolist()))
        if limit is not None and len(wanted) >= limit:
            wanted = dict.fromkeys(itertools.islice(wanted, limit))
            break
    last = max(wanted, default=-1)
    for index, (where, row) in enumerate(itertools.islice(store.entry.source.rows(), last + 1)):
        if index in wanted:
            yield where, settings.example(row, tokenizer, where)


def training_texts(
    data: Data, tokenizer: Tokenizer, *, first_rows: int | None = None, formats: frozenset[str] = LANGUAGE_FORMATS
) -> Iterator[str]:
    """Every example of the training sources with `role: new` as one text, in the order of the files; wrong rows are left out.

    Raises:
        DataError: a source cannot be read.
    """
    problems = Problems()
    sources = [source for source in named_sources(data, problems) if source.part == "train" and source.entry.role == "new"]
    problems.raise_any()
    for source in sources:
        plan = plan_source(source, data, tokenizer, first_rows, formats)
        for _, where, row in plan.rows():
            with contextlib.suppress(DataError):
                yield "".join(segment.text for segment in plan.format.example(row, tokenizer, where).segments)


def _holdout(entry: TrainSource | EvaluationSource) -> float | None:
    """The share of its rows that a source is."""
    return getattr(entry, "holdout", None)


def _holdout_note(store: TreeStore, train: Sequence[TreeStore]) -> str:
    """How many rows `store` holds out, and of which training source."""
    origin = next((other.name for other in train if other.entry.source == store.entry.source), None)
    if origin is None:
        return f"`{store.name}` is {store.report.rows_read} rows that are held out of its source"
    if not len(store):
        return f"`{origin}` has too few rows to hold some out; there is no evaluation"
    return f"{store.report.rows_read} rows of `{origin}` are held out as `{store.name}`"


@dataclass(frozen=True)
class _Holdout:
    """A division of a source into rows to train on and rows held out."""

    side: Part
    share: float
    of_rows: int | None
    """The share is of the first so many rows."""

    def key(self, limit: int | None) -> Division:
        """What tells one division from another, for the name of a store of the first `limit` rows."""
        return (self.side, self.share) if self.of_rows == limit else (self.side, self.share, self.of_rows)


@dataclass(frozen=True)
class _Builder:
    """Finds the store of a source in the cache, or makes it."""

    data: Data
    tokenizer: Tokenizer
    cache_folder: Path
    progress: Progress | None
    may_grow: bool
    first_rows: int | None
    divisions: dict[tuple[str, float, int | None], HeldOut] = field(default_factory=dict)

    def await_first(self, stores: list[TreeStore]) -> list[TreeStore]:
        """The stores that still grow; their beginnings are there, on which a run looks before it trains."""
        from ftcli.data.growing import GrowingStore

        if self.data.mixture.kind != "stream":
            return []
        found: list[TreeStore] = []
        for store in stores:
            if isinstance(store, GrowingStore):
                store.arrived(max(self.data.mixture.window, MIN_ARRIVED), lambda store=store: self._tell(store.rows_read, store.name))  # type: ignore[misc]
                found += [] if store.is_complete else [store]
        return found

    def store(self, plan: Plan) -> TreeStore:
        """The source's trees: the rows that it holds out, or, of a training source, all that no evaluation source holds out of it."""
        share = _holdout(plan.source.entry)
        if share is not None:
            return self._find_or_build(plan, _Holdout("evaluation", share, plan.limit))
        return self._find_or_build(plan, self._held_out_of(plan))

    def _held_out_of(self, plan: Plan) -> _Holdout | None:
        """The rows to leave out of a training source; of two evaluation sources that hold some out the larger share, which has both."""
        if plan.source.part != "train":
            return None
        entries = [entry for entry in self.data.evaluation if entry.holdout is not None and entry.source == plan.source.entry.source]
        if not entries:
            return None
        entry = max(entries, key=lambda entry: entry.holdout or 0.0)
        limits = [limit for limit in (entry.limit, self.first_rows) if limit is not None]
        return _Holdout("train", entry.holdout or 0.0, min(limits, default=None))

    def _rows(self, plan: Plan, holdout: _Holdout | None) -> Callable[[], Iterable[Row]]:
        if holdout is None:
            return plan.rows

        def divided() -> Iterator[Row]:
            found = self._held_out(plan.source.entry.source, holdout.share, holdout.of_rows)
            if holdout.side == "train":
                return (row for row in plan.rows() if not found.has(row[0], row[2]))
            rows = itertools.islice(plan.rows(), max(found.places, default=-1) + 1)
            return (row for row in rows if row[0] in found.places)

        return divided

    def _held_out(self, source: Source, share: float, of_rows: int | None) -> HeldOut:
        """What is held out of a source, told once for both sides."""
        from ftcli.data.holdout import held_out

        key = (source.fingerprint(), share, of_rows)
        if key not in self.divisions:
            self.divisions[key] = held_out((row for _, row in itertools.islice(source.rows(), of_rows)), share)
        return self.divisions[key]

    def _find_or_build(self, plan: Plan, holdout: _Holdout | None) -> TreeStore:
        from ftcli.data.cache import Build, find_or_build, key_of_rows, key_of_source
        from ftcli.data.chunks import Work
        from ftcli.data.growing import GrowingStore
        from ftcli.data.store import TreeStore, read_meta
        from ftcli.data.workers import default_workers

        source, work = plan.source, Work(plan.format, self.tokenizer, plan.max_length, plan.policy)
        fingerprint, divided = source.entry.source.fingerprint(), None if holdout is None else holdout.key(plan.limit)
        build = Build(
            key=key_of_source(fingerprint, work, limit=plan.limit, holdout=divided),
            name=source.name,
            work=work,
            rows=self._rows(plan, holdout),
            num_workers=default_workers() if self.data.workers is None else self.data.workers,
            may_be_empty=holdout is not None and holdout.side == "evaluation",
        )
        if (
            self.may_grow
            and self.data.mixture.kind == "stream"
            and source.part == "train"
            and read_meta(self.cache_folder / "trees" / build.key) is None
        ):
            return GrowingStore(self.cache_folder, build, source.entry)
        folder, cache_hit = find_or_build(self.cache_folder, build, lambda done: self._tell(done, source.name))
        store = TreeStore(folder, source.entry, source.name, cache_hit=cache_hit)
        store.rows_key = key_of_rows(fingerprint, plan.format, limit=plan.limit, holdout=divided)
        return store

    def _tell(self, done: int, name: str) -> None:
        if self.progress is not None:
            self.progress.update(done, None, f"tokenise {name}")
