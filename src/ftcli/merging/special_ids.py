"""Special tokens that configurations name by number (`eos_token_id`), and what becomes of the numbers in another vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcli.merging.documents import read_object
from ftcli.merging.layers import text_config
from ftcli.merging.sources import Source
from ftcli.merging.tokens import TokenTable

_KEY_END = "_token_id"
_USUAL = tuple(f"{name}{_KEY_END}" for name in ("bos", "eos", "pad"))


@dataclass(frozen=True)
class SpecialIds:
    """Where the tokens of one model's configurations are in the merged vocabulary."""

    moved: Mapping[int, int]
    """The new ids of tokens that have others now."""
    gone: frozenset[int]
    """Ids of tokens that the merged vocabulary has not."""
    stand_ins: Mapping[str, Any]
    """By key, what the model of the merged tokenizer has there, in merged ids."""

    @property
    def is_needed(self) -> bool:
        """False where every id means what it meant."""
        return bool(self.moved or self.gone)

    def renumber(self, config: dict[str, Any]) -> None:
        """Give the special tokens that a configuration names their merged ids; those that are gone become the merged tokenizer's own."""
        for key in config:
            ids = _ids(config, key)
            if not ids:
                continue
            kept = [self.moved.get(number, number) for number in ids if number not in self.gone]
            if kept:
                config[key] = kept if isinstance(config[key], list) else kept[0]
            else:
                config[key] = self.stand_ins.get(key)


def _ids(config: Mapping[str, Any], key: str) -> list[int]:
    """The ids under a key; none where no token is named there."""
    value = config.get(key) if key.endswith(_KEY_END) else None
    values = value if isinstance(value, list) else [value]
    numbers = [number for number in values if isinstance(number, int) and not isinstance(number, bool)]
    return numbers if len(numbers) == len(values) else []


def special_ids(tokens: Mapping[str, int], named: TokenTable, source: Source, table: TokenTable) -> SpecialIds:
    """What becomes of a configuration's ids.

    Args:
        tokens: the merged vocabulary.
        named: of the model whose configuration it is.
        source: the model whose tokenizer was chosen, with its own `table`.

    Raises:
        RequestError: one of its files cannot be read.
    """
    moved = {number: tokens[token] for token, number in named.ids.items() if token in tokens and tokens[token] != number}
    there = {number for token, number in named.ids.items() if token in tokens}
    return SpecialIds(moved, frozenset(named.ids.values()) - there, _own_ids(tokens, source, table))


def _own_ids(tokens: Mapping[str, int], source: Source, table: TokenTable) -> dict[str, Any]:
    """The special tokens of a model, by key, in merged ids: the tokenizer's, or the configuration's where these are among them."""
    config = {**source.config, **text_config(source.config)}
    words = _object(source.tokenizer_folder / "tokenizer_config.json")
    names = {number: token for token, number in table.ids.items()}
    found: dict[str, Any] = {}
    for key in dict.fromkeys((*_USUAL, *config)):
        configured = [tokens[names[number]] for number in _ids(config, key) if names.get(number) in tokens]
        word = words.get(key.removesuffix("_id")) if key.endswith(_KEY_END) else None
        word = word.get("content") if isinstance(word, dict) else word
        spoken = tokens.get(word) if isinstance(word, str) else None
        if configured and spoken in (None, *configured):
            found[key] = configured if isinstance(config[key], list) else configured[0]
        elif spoken is not None:
            found[key] = spoken
    return found


def _object(path: Path) -> Mapping[str, Any]:
    return read_object(path) if path.is_file() else {}


def lost_tokens(ids: SpecialIds, source: Source, named: TokenTable, tokens: Mapping[str, int]) -> str | None:
    """A sentence on the special tokens that a model's configurations name and the merged vocabulary has not; None where all are there.

    Raises:
        RequestError: one of its files cannot be read.
    """
    names = {number: token for token, number in named.ids.items()}
    merged = {number: token for token, number in tokens.items()}
    said: dict[str, None] = {}
    for config in (source.config, text_config(source.config), _object(source.folder / "generation_config.json")):
        for key in config:
            lost = [number for number in _ids(config, key) if number in ids.gone]
            if not lost:
                continue
            rest = {key: config[key]}
            ids.renumber(rest)
            now = [f"`{merged[number]}`" for number in _ids(rest, key) if number in merged]
            said[f"`{key}` was {', '.join(f'`{names[number]}`' for number in lost)} and is {', '.join(now) or 'nothing'} now"] = None
    if not said:
        return None
    return f"special tokens that `{source.reference}` names are not in the merged vocabulary: {'; '.join(said)}"
