"""The vocabulary of the merged model, and where each model has its tokens: rows are matched by token, never by number.

A union of BPE vocabularies keeps the first one's merges in front and puts the others' behind them, so that new tokens come about as
they did where they come from. Added words, which would be cut out of the text before any merge, are made of special tokens only.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ftcli.errors import Problem
from ftcli.files import write_exact_json
from ftcli.merging.documents import read_object
from ftcli.merging.layers import embedding_name, is_head
from ftcli.merging.recipe import MergeRecipe, TokenSource
from ftcli.merging.sources import Source
from ftcli.merging.special_ids import SpecialIds, lost_tokens, special_ids
from ftcli.merging.tokens import TokenTable, combined, read_tokens
from ftcli.models.tokenizer import TOKENIZER_FILES

_WITHOUT_TABLES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

_MOST_ROWS = 2**24
_LISTED = 5

Place = tuple[int, int]
"""A source, and a row of its embedding."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of the merged model, and whose rows their embeddings are made of."""

    size: int
    """Rows of the merged embedding."""
    own: Mapping[int, NDArray[np.int64]]
    """For each source, its row of each merged token, -1 where it has none."""
    substitutes: Mapping[int, tuple[Place, ...]]
    """For a merged row that a source has not: the rows whose mean is taken; none of them is zeros."""
    rowless: frozenset[int]
    """Merged rows of tokens that no source has a row for: each source's mean."""
    forced: frozenset[int]
    """Merged rows that are substituted in every source."""
    padding: int
    """Merged rows from here on belong to no token: each source's mean."""
    donor: Source
    table: TokenTable | None
    """The merged tokens, where they are not those of `donor`."""
    special: SpecialIds
    """For the ids in the merged configuration, which is not always the donor's of the tokens: what they have become."""

    @property
    def providers(self) -> tuple[int, ...]:
        """Sources whose rows may stand in for others'."""
        return tuple(dict.fromkeys(source for places in self.substitutes.values() for source, _ in places))

    def is_identity(self, source: int) -> bool:
        """True when the source's rows are the merged ones."""
        rows = self.own[source]
        return self.padding == self.size and not self.forced and bool((rows == np.arange(self.size)).all())

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        origin = self.donor.tokenizer_folder
        for name in TOKENIZER_FILES:
            if (origin / name).is_file() and (self.table is None or name not in _WITHOUT_TABLES):
                shutil.copyfile(origin / name, folder / name)
        if self.table is None:
            return
        write_exact_json(folder / "tokenizer.json", self.table.document)
        path = folder / "tokenizer_config.json"
        if path.is_file():
            config = read_object(path)
            if "added_tokens_decoder" in config:
                keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
                config["added_tokens_decoder"] = {
                    str(token["id"]): {key: token[key] for key in keys if key in token} for token in self.table.document["added_tokens"]
                }
            write_exact_json(path, config)
        (folder / "added_tokens.json").unlink(missing_ok=True)


def plan_vocabulary(
    recipe: MergeRecipe, sources: Sequence[Source], index: Mapping[str, int], donor: int, problems: list[Problem], warnings: list[str]
) -> Vocabulary | None:
    """The merged vocabulary that the recipe asks for; None where rows are taken as they are, after a look at whether they may be."""
    settings = recipe.tokenizer
    if settings is None:
        _compare(sources, donor, warnings)
        return None
    tables = _tables(recipe, sources, problems)
    if tables is None:
        return None
    lead = index.get(settings.source, donor)
    table = None
    if settings.source in ("union", "intersection"):
        others = [tables[number] for number in range(len(sources)) if number != lead]
        made = combined(tables[lead], others, settings.source)
        if isinstance(made, str):
            problems.append(Problem(recipe.where(settings.path), made, "`source: base`, or one of the models"))
            return None
        table = made
    elif settings.source != "base" and settings.source not in index:
        problems.append(Problem(recipe.where(settings.path), f"`{settings.source}` is none of the models", "base, union, intersection"))
        return None
    tokens = dict((table or tables[lead]).ids)
    if added := [token for token in settings.tokens if token not in tokens]:
        table = (table or tables[lead]).with_added(added)
        tokens = dict(table.ids)
    num_rows = max(tokens.values()) + 1
    if table is None and (name := embedding_name(sources[lead])) is not None:
        num_rows = max(num_rows, sources[lead].tensors[name].shape[0])
    multiple = settings.pad_to_multiple_of or 1
    size = -(-num_rows // multiple) * multiple
    if size > _MOST_ROWS:
        what = f"the merged vocabulary would have {size} rows, allowed: at most {_MOST_ROWS}"
        problems.append(Problem(recipe.where(settings.path), what, "look for wrong ids in tokenizer.json"))
        return None
    draft = _Rows(sources, tables, tokens, lead, num_rows, size, keeps_rows=table is None)
    substitutes, forced = draft.substitutes(None if recipe.base is None else index[recipe.base]), set[int]()
    _apply_rules(recipe, settings.tokens, tokens, sources, tables, index, substitutes, forced, problems)
    nowhere = np.all([rows < 0 for rows in draft.own.values()], axis=0)
    rowless = {token: row for token, row in tokens.items() if nowhere[row] and row not in substitutes}
    special = special_ids(tokens, tables[donor], sources[lead], tables[lead])
    warnings += [text for text in (_without_rows(rowless), lost_tokens(special, sources[donor], tables[donor], tokens)) if text is not None]
    return Vocabulary(
        size, draft.own, substitutes, frozenset(rowless.values()), frozenset(forced), num_rows, sources[lead], table, special
    )  # fmt: skip


def _tables(recipe: MergeRecipe, sources: Sequence[Source], problems: list[Problem]) -> list[TokenTable] | None:
    found: list[TokenTable] = []
    for source in sources:
        table = read_tokens(source.tokenizer_folder)
        if isinstance(table, str):
            assert recipe.tokenizer is not None
            problems.append(Problem(recipe.where(recipe.tokenizer.path), f"`{source.reference}`: {table}"))
        else:
            found.append(table)
    return found if len(found) == len(sources) else None


@dataclass
class _Rows:
    """Which row of each source a merged row is."""

    sources: Sequence[Source]
    tables: Sequence[TokenTable]
    tokens: Mapping[str, int]
    lead: int
    num_rows: int
    size: int
    keeps_rows: bool
    """The lead's rows stay where they are, those without a token, too."""
    own: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for number, (source, table) in enumerate(zip(self.sources, self.tables, strict=True)):
            rows = np.full(self.size, -1, np.int64)
            name = embedding_name(source)
            available = source.tensors[name].shape[0] if name is not None else 0
            if self.keeps_rows and number == self.lead:
                count = min(self.num_rows, available)
                rows[:count] = np.arange(count)
            else:
                for token, row in self.tokens.items():
                    if (found := table.ids.get(token, -1)) < available:
                        rows[row] = found
            self.own[number] = rows

    def substitutes(self, base: int | None) -> dict[int, tuple[Place, ...]]:
        """For every row that some sources have not and others have: the base's, else the mean of those that have it."""
        missing = np.zeros(self.size, bool)
        for rows in self.own.values():
            missing |= rows < 0
        missing[self.num_rows :] = False
        found: dict[int, tuple[Place, ...]] = {}
        for row in np.flatnonzero(missing).tolist():
            if base is not None and self.own[base][row] >= 0:
                found[row] = ((base, int(self.own[base][row])),)
            elif places := tuple((number, int(rows[row])) for number, rows in self.own.items() if rows[row] >= 0):
                found[row] = places
        return found


def _apply_rules(
    recipe: MergeRecipe,
    rules: Mapping[str, TokenSource],
    tokens: Mapping[str, int],
    sources: Sequence[Source],
    tables: Sequence[TokenTable],
    index: Mapping[str, int],
    substitutes: dict[int, tuple[Place, ...]],
    forced: set[int],
    problems: list[Problem],
) -> None:
    """What the recipe says of single tokens."""
    assert recipe.tokenizer is not None
    for token, rule in rules.items():
        row, where = tokens[token], recipe.where((*recipe.tokenizer.path, "tokens", token))
        if rule.kind == "zero":
            substitutes[row] = ()
        else:
            number = index[str(rule.model)]
            wanted = rule.token if rule.token is not None else token
            found = wanted if isinstance(wanted, int) else tables[number].ids.get(wanted)
            rows = _num_rows(sources[number])
            if found is None:
                problems.append(Problem(where, f"`{rule.model}` has no token `{wanted}`"))
                continue
            if not 0 <= found < rows:
                problems.append(Problem(where, f"found row {found}, `{rule.model}` has {rows} rows: 0 to {rows - 1}"))
                continue
            substitutes[row] = ((number, found),)
        if rule.force:
            forced.add(row)


def _without_rows(rowless: Mapping[str, int]) -> str | None:
    """A warning about tokens that no model has a row for."""
    if not rowless:
        return None
    listed = ", ".join(f"`{token}`" for token in list(rowless)[:_LISTED])
    more = f" ... and {len(rowless) - _LISTED} more" if len(rowless) > _LISTED else ""
    return f"no model has a row for {listed}{more}: they get the mean row, which says nothing of them"


def _num_rows(source: Source) -> int:
    """Rows that a model has for tokens, in its embedding and its head."""
    names = [embedding_name(source), *(name for name in source.tensors if is_head(name) and name.endswith(".weight"))]
    return min((source.tensor(name).shape[0] for name in names if name is not None), default=0)


def _compare(sources: Sequence[Source], donor: int, warnings: list[str]) -> None:
    """Warn where the same row is another token."""
    first = sources[donor].tokenizer_folder / "tokenizer.json"
    for source in sources:
        other = source.tokenizer_folder / "tokenizer.json"
        if source is sources[donor] or not (first.is_file() and other.is_file()) or first.read_bytes() == other.read_bytes():
            continue
        ours, theirs = read_tokens(first.parent), read_tokens(other.parent)
        if isinstance(ours, str) or isinstance(theirs, str):
            continue
        moved = [token for token, row in ours.ids.items() if theirs.ids.get(token, row) != row]
        unknown = [token for token in theirs.ids if token not in ours.ids]
        if moved or unknown:
            found = f"{len(moved)} tokens have other rows, {len(unknown)} are in the second only"
            advice = "rows are merged as they stand; `tokenizer: {source: base}` or `union` goes by token"
            warnings.append(f"`{sources[donor].reference}` and `{source.reference}`: {found}; {advice}")
