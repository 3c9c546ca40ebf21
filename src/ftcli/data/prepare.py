"""From the recipe's `data` to token trees: `prepare` makes or finds all of them, `look` tries the first rows of every source."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ftcli.data.formats.detect import LANGUAGE_FORMATS
from ftcli.data.names import free_name
from ftcli.errors import DataError, Problem

if TYPE_CHECKING:
    from ftcli.data.audit import AuditReport
    from ftcli.data.cache import Division
    from ftcli.data.chunks import Row
    from ftcli.data.example import Example
    from ftcli.data.formats import Format
    from ftcli.data.overflow import Policy
    from ftcli.data.settings import Data, EvaluationSource, OnOverflow, TrainSource
    from ftcli.data.store import TreeStore
    from ftcli.data.tree import TokenTree
    from ftcli.models.tokenizer import Tokenizer

Part = Literal["train", "evaluation"]
DETECT_ROWS = 64
LOOK_CHARS = 2000
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


@dataclass(frozen=True)
class SourceLook:
    """What the first rows of a source become."""

    part: Part
    name: str
    role: str
    format: str
    """Kind of the format that reads the rows."""
    is_detected: bool
    """The recipe does not name the format."""
    num_rows: int
    """Rows looked at."""
    num_examples: int
    num_tokens: int
    num_targets: int
    dropped: dict[str, int]
    """Rows left out, by the reason."""
    unread: str | None
    """What to tell of a column that looks like the answer and is not read."""
    trees: list[TokenTree]
    wheres: list[str]
    """For each tree where its row stands."""

    def line(self) -> str:
        """The look in one line."""
        detected = ", found from its columns" if self.is_detected else ""
        ratio = self.num_targets / max(1, self.num_tokens)
        dropped = "".join(f", {count} dropped: {reason}" for reason, count in sorted(self.dropped.items()))
        rows = "1 row" if self.num_rows == 1 else f"{self.num_rows} rows"
        examples = "1 example" if self.num_examples == 1 else f"{self.num_examples} examples"
        return (
            f"{self.part} {self.name} ({self.format}{detected}): first {rows}, {examples}, "
            f"{self.num_tokens} tokens, {ratio:.0%} trained{dropped}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the trees."""
        return {name: value for name, value in vars(self).items() if name not in ("trees", "wheres")}


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

    problems = _Problems()
    own_holdout = data.held_out()
    if own_holdout is not None:
        data = data.model_copy(update={"evaluation": (own_holdout,)})
    builder = _Builder(data, tokenizer, cache_folder, progress, may_grow, first_rows)
    plans: list[_Plan] = []
    for source in _named_sources(data, problems):
        if source.entry is own_holdout and problems.are_found:
            continue  # its rows are those of the training source, which has said what is wrong with them
        with problems.collecting():
            plans.append(_plan(source, data, tokenizer, first_rows, formats))
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
    notes += [note for store in (*there, *evaluation) for note in store.report.left_out()]
    blocks = [(store.name, len(store.example_lengths)) for store in there if store.first_trees is not None]
    notes += [f"`{name}` is {count} blocks of {data.max_length} tokens" for name, count in blocks]
    found = kept_audit(cache_folder, there, evaluation)
    # A source that is trained and evaluated on would be told of twice.
    return Prepared(train, evaluation, found, tuple(dict.fromkeys([*notes, *found.lines()])))


def look(
    data: Data, tokenizer: Tokenizer, rows_per_source: int = DETECT_ROWS, formats: frozenset[str] = LANGUAGE_FORMATS
) -> list[SourceLook]:
    """What the first rows of every source become, without cache and processes.

    Raises:
        DataError: all that is wrong with the first rows of all sources.
    """
    problems = _Problems()
    looks: list[SourceLook] = []
    for source in _named_sources(data, problems):
        # What the base model has yet to write cannot be looked at.
        if source.entry.source.kind == "self":
            continue
        with problems.collecting():
            looks.append(_look(_plan(source, data, tokenizer, rows_per_source, formats), data, tokenizer))
    problems.raise_any()
    return looks


def examples_of(store: TreeStore, tokenizer: Tokenizer, limit: int | None = None) -> Iterator[tuple[str, Example]]:
    """(where, example) of the first `limit` rows that `store` has trees of, in their order: for generating answers."""
    import numpy as np

    settings = store.entry.format or _detect(store.entry, frozenset({store.report.format}))
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
    problems = _Problems()
    sources = [source for source in _named_sources(data, problems) if source.part == "train" and source.entry.role == "new"]
    problems.raise_any()
    for source in sources:
        plan = _plan(source, data, tokenizer, first_rows, formats)
        for _, where, row in plan.rows():
            with contextlib.suppress(DataError):
                yield "".join(segment.text for segment in plan.format.example(row, tokenizer, where).segments)


class _Problems:
    """Collects what is wrong with several sources, to tell it all at once."""

    def __init__(self) -> None:
        self._errors: list[DataError] = []

    @property
    def are_found(self) -> bool:
        return bool(self._errors)

    def add(self, problem: Problem) -> None:
        self._errors.append(DataError("", [problem]))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Data errors inside are kept for later."""
        try:
            yield
        except DataError as error:
            self._errors.append(error)

    def raise_any(self) -> None:
        if len(self._errors) == 1 and self._errors[0].summary:
            raise self._errors[0]
        problems: list[Problem] = []
        for error in self._errors:
            if error.hint is not None or not error.problems:
                problems.append(Problem("", error.summary, error.hint))
            problems += error.problems
        if problems:
            raise DataError(f"the data has {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems)


@dataclass(frozen=True)
class _Source:
    """A source of the recipe with the name that logs and metrics call it."""

    part: Part
    entry: TrainSource | EvaluationSource
    name: str


def _named_sources(data: Data, problems: _Problems) -> list[_Source]:
    """Every source with a name that no other of its part has; a name given twice is a problem."""
    result = []
    parts: tuple[tuple[Part, Sequence[TrainSource | EvaluationSource]], ...] = (("train", data.train), ("evaluation", data.evaluation))
    for part, entries in parts:
        given = [entry.name for entry in entries if entry.name is not None]
        for index, entry in enumerate(entries):
            if entry.name is not None and entry.name in [other.name for other in entries[:index]]:
                problems.add(
                    Problem(f"data.{part}.{index}.name", f"`{entry.name}` is the name of another source", "give each its own name")
                )
        taken = set(given)
        for entry in entries:
            name = entry.name if entry.name is not None else free_name(entry.source.label(), taken)
            taken.add(name)
            result.append(_Source(part, entry, name))
    return result


@dataclass(frozen=True)
class _Plan:
    """How the rows of a source become trees."""

    source: _Source
    format: Format
    is_detected: bool
    policy: Policy
    limit: int | None
    """Only the first so many rows."""
    columns: tuple[str, ...]
    """Of the first row."""

    def notes(self) -> list[str]:
        """What was decided that the recipe does not say."""
        notes = [f"format of `{self.source.name}` is `{self.format.kind}`, found from its columns"] if self.is_detected else []
        unread = self.unread()
        return notes if unread is None else [*notes, f"`{self.source.name}` {unread}"]

    def unread(self) -> str | None:
        """What to tell of a column that looks like the answer and is not read."""
        from ftcli.data.formats.detect import unread_answer

        return unread_answer(self.format, self.columns)

    def rows(self) -> Iterator[Row]:
        """(index, where, row) of the rows to take."""
        for index, (where, row) in enumerate(itertools.islice(self.source.entry.source.rows(), self.limit)):
            yield index, where, row


def _plan(source: _Source, data: Data, tokenizer: Tokenizer, first_rows: int | None, formats: frozenset[str]) -> _Plan:
    """The format and the policy of a source; its first row is tried, so that what stops every row stops here.

    Raises:
        DataError: no format reads it, the objective cannot learn from its format, or it has no rows.
        RequestError: the tokenizer cannot do what the format needs.
    """
    entry = source.entry
    settings = entry.format or _detect(entry, formats)
    if settings.kind not in formats:
        what = f"format `{settings.kind}` is not one that the objective learns from ({', '.join(sorted(formats))})"
        hint = "set `objective: {kind: classification}`" if settings.kind == "label" else None
        raise DataError(f"`{source.name}` cannot be used", [Problem(source.name, what, hint)])
    limits = [limit for limit in (entry.limit, first_rows) if limit is not None]
    where, row = next(entry.source.rows(), ("", None))
    if row is None:
        raise DataError(f"`{source.name}` cannot be used", [Problem(source.name, "has no rows")])
    # A wrong row is counted with all others later.
    with contextlib.suppress(DataError):
        settings.example(row, tokenizer, where)
    return _Plan(source, settings, entry.format is None, _policy(source, data.on_overflow, settings), min(limits, default=None), tuple(row))


def _detect(entry: TrainSource | EvaluationSource, formats: frozenset[str]) -> Format:
    from ftcli.data.formats.detect import detect_format

    return detect_format([row for _, row in itertools.islice(entry.source.rows(), DETECT_ROWS)], entry.source.label(), formats)


def _policy(source: _Source, on_overflow: OnOverflow, settings: Format) -> Policy:
    """What happens to rows that are too long.

    Raises:
        DataError: blocks are asked for of what cannot be cut.
    """
    if getattr(source.entry, "unit", "row") == "block":
        if settings.kind != "text" or on_overflow not in ("auto", "split"):
            found = f"format `{settings.kind}`" if settings.kind != "text" else f"`data.on_overflow: {on_overflow}`"
            problem = Problem(source.name, f"`unit: block` cuts texts where blocks end, found {found}", "leave out `unit`, or the other")
            raise DataError(f"`{source.name}` cannot be used", [problem])
        return "block"
    if on_overflow == "auto":
        return "split" if settings.kind == "text" else "error"
    return on_overflow


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

    def store(self, plan: _Plan) -> TreeStore:
        """The source's trees: the rows that it holds out, or, of a training source, all that no evaluation source holds out of it."""
        share = _holdout(plan.source.entry)
        if share is not None:
            return self._find_or_build(plan, _Holdout("evaluation", share, plan.limit))
        return self._find_or_build(plan, self._held_out_of(plan))

    def _held_out_of(self, plan: _Plan) -> _Holdout | None:
        """The rows to leave out of a training source; of two evaluation sources that hold some out the larger share, which has both."""
        if plan.source.part != "train":
            return None
        entries = [entry for entry in self.data.evaluation if entry.holdout is not None and entry.source == plan.source.entry.source]
        if not entries:
            return None
        entry = max(entries, key=lambda entry: entry.holdout or 0.0)
        limits = [limit for limit in (entry.limit, self.first_rows) if limit is not None]
        return _Holdout("train", entry.holdout or 0.0, min(limits, default=None))

    def _rows(self, plan: _Plan, holdout: _Holdout | None) -> Callable[[], Iterable[Row]]:
        from ftcli.data.holdout import held_out_hashes, row_hash

        if holdout is None:
            return plan.rows

        def divided() -> Iterator[Row]:
            hashes = held_out_hashes(lambda: (row for _, row in plan.source.entry.source.rows()), holdout.share, holdout.of_rows)
            return (row for row in plan.rows() if (row_hash(row[2]) in hashes) == (holdout.side == "evaluation"))

        return divided

    def _find_or_build(self, plan: _Plan, holdout: _Holdout | None) -> TreeStore:
        from ftcli.data.cache import Build, find_or_build, key_of_rows, key_of_source
        from ftcli.data.chunks import Work
        from ftcli.data.growing import GrowingStore
        from ftcli.data.store import TreeStore, read_meta
        from ftcli.data.workers import default_workers

        source, work = plan.source, Work(plan.format, self.tokenizer, self.data.max_length, plan.policy)
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


def _look(plan: _Plan, data: Data, tokenizer: Tokenizer) -> SourceLook:
    """What the rows of a plan become.

    Raises:
        DataError: something is wrong with them.
    """
    import numpy as np

    from ftcli.data.chunks import RowTokeniser, Work
    from ftcli.data.verdict import refuse

    tokeniser = RowTokeniser(Work(plan.format, tokenizer, data.max_length, plan.policy))
    trees: list[TokenTree] = []
    wheres: list[str] = []
    for row in plan.rows():
        found = tokeniser.trees(_beginning(row) if plan.policy in ("split", "block") else row)
        trees += found
        wheres += [row[1]] * len(found)
    tally = tokeniser.tally
    # Later rows may fit where the first ones are all too long.
    may_be_empty = tally.rows_read == plan.limit and set(tally.dropped) == {"too long"}
    refuse(tally, np.array(tokeniser.row_lengths, dtype=np.int32), plan.source.name, tokeniser.work, may_be_empty=may_be_empty)
    return SourceLook(
        part=plan.source.part,
        name=plan.source.name,
        role=plan.source.entry.role,
        format=plan.format.kind,
        is_detected=plan.is_detected,
        num_rows=tally.rows_read,
        num_examples=tally.num_examples,
        num_tokens=tally.num_tokens,
        num_targets=tally.num_targets,
        dropped=dict(tally.dropped),
        unread=plan.unread(),
        trees=trees,
        wheres=wheres,
    )


def _beginning(row: Row) -> Row:
    """A row with its longest texts cut: of a book that will be split, the first pages show enough."""
    index, where, values = row
    return index, where, {name: value[:LOOK_CHARS] if isinstance(value, str) else value for name, value in values.items()}
