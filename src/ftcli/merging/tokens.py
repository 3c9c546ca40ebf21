"""Tokens by their ids, from tokenizer.json; unions and intersections of such tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SAME = ("normalizer", "pre_tokenizer", "decoder")
_SAME_MODEL = ("type", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class TokenTable:
    """A tokenizer's tokens, with the document they stand in."""

    ids: Mapping[str, int]
    document: Mapping[str, Any]
    """tokenizer.json."""

    @property
    def kind(self) -> str:
        model: Mapping[str, Any] = self.document["model"]
        return str(
            model.get("type") or ("BPE" if "merges" in model else "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece")
        )

    @property
    def added(self) -> list[dict[str, Any]]:
        """Words that are cut out of the text before all else."""
        return list(self.document.get("added_tokens") or ())

    @property
    def merges(self) -> list[tuple[str, str]]:
        """BPE's pairs, first ones first."""
        pairs = self.document["model"].get("merges") or ()
        halves = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs]
        return [(first, second) for first, second in halves]

    def with_added(self, tokens: Sequence[str]) -> TokenTable:
        """With further special tokens behind all others."""
        document = copy.deepcopy(dict(self.document))
        ids, following = dict(self.ids), max(self.ids.values()) + 1
        for token in tokens:
            ids[token] = following
            document.setdefault("added_tokens", []).append(_special(token, following))
            following += 1
        return TokenTable(ids, document)


def _special(token: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def read_tokens(folder: Path) -> TokenTable | str:
    """The tokens of a folder's tokenizer, or why there are none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "it has no tokenizer.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        vocab = document["model"]["vocab"]
        ids = {entry[0]: number for number, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        ids |= {token["content"]: token["id"] for token in document.get("added_tokens") or ()}
        table = TokenTable(ids, document)
        if not ids or not all(isinstance(number, int) and number >= 0 for number in ids.values()):
            return "tokenizer.json has no tokens, or ids that are no whole numbers from 0 on"
        _ = table.merges  # malformed pairs are found here
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return f"tokenizer.json cannot be read: {error}"
    return table


def combined(first: TokenTable, others: Sequence[TokenTable], how: str) -> TokenTable | str:
    """The union or intersection of vocabularies, in the first one's order, or why there is none."""
    for other in others:
        if other.ids == first.ids and (first.kind != "BPE" or other.merges == first.merges):
            continue
        if fault := _fault(first, other):
            return fault
    return _union(first, others) if how == "union" else _intersection(first, others)


def _fault(first: TokenTable, other: TokenTable) -> str | None:
    if first.kind != other.kind:
        return f"the tokenizers are of kinds {first.kind} and {other.kind}, which have no common vocabulary"
    if first.kind == "Unigram":
        return "the scores of two Unigram tokenizers cannot be compared"
    model, theirs = first.document["model"], other.document["model"]
    different = [key for key in _SAME_MODEL if (model.get(key) or None) != (theirs.get(key) or None) and key != "type"]
    different += [key for key in _SAME if first.document.get(key) != other.document.get(key)]
    if different:
        return f"the tokenizers cut text differently ({', '.join(different)}), and their tokens do not mean the same"
    return None


def _union(first: TokenTable, others: Sequence[TokenTable]) -> TokenTable:
    document = copy.deepcopy(dict(first.document))
    ids = dict(first.ids)
    following = max(ids.values()) + 1
    vocab, merges = document["model"]["vocab"], first.merges
    known = set(merges)
    for other in others:
        special = {token["content"]: token for token in other.added}
        for token, _ in sorted(other.ids.items(), key=lambda item: item[1]):
            if token in ids:
                continue
            ids[token] = following
            if token in special:
                document.setdefault("added_tokens", []).append({**special[token], "id": following})
            else:
                vocab[token] = following
            following += 1
        # behind all that are there: what was merged before is merged as before
        fresh = [pair for pair in other.merges if pair not in known] if other.kind == "BPE" else []
        merges += fresh
        known.update(fresh)
    # an added word that is not in the table is numbered anew when the file is read, behind the table, whatever its id
    for token in document.get("added_tokens") or ():
        vocab.setdefault(token["content"], token["id"])
    if first.kind == "BPE":
        document["model"]["merges"] = _written(first, merges)
    return TokenTable(ids, document)


def _intersection(first: TokenTable, others: Sequence[TokenTable]) -> TokenTable | str:
    document = copy.deepcopy(dict(first.document))
    common = set(first.ids)
    for other in others:
        common &= set(other.ids)
    special = {token["content"] for token in first.added}
    kept = [token for token, _ in sorted(first.ids.items(), key=lambda item: item[1]) if token in common or token in special]
    ids = {token: number for number, token in enumerate(kept)}
    if not common - special:
        return "the tokenizers have no token in common"
    document["model"]["vocab"] = {
        token: number for token, number in ids.items() if token not in special or token in first.document["model"]["vocab"]
    }
    if first.kind == "BPE":
        merges = [pair for pair in first.merges if {*pair, "".join(pair)} <= set(ids)]
        document["model"]["merges"] = _written(first, merges)
    document["added_tokens"] = [{**token, "id": ids[token["content"]]} for token in first.added]
    _renumber(document.get("post_processor"), ids)
    return TokenTable(ids, document)


def _renumber(value: Any, ids: Mapping[str, int]) -> None:
    """Give the special tokens that a post-processor puts in their new ids."""
    if not isinstance(value, dict):
        return
    for entry in (value.get("special_tokens") or {}).values():
        entry["ids"] = [ids.get(word, old) for word, old in zip(entry.get("tokens", ()), entry.get("ids", ()), strict=False)]
    for key in ("sep", "cls"):
        if isinstance(value.get(key), list) and value[key][0] in ids:
            value[key][1] = ids[value[key][0]]
    for inner in value.get("processors") or ():
        _renumber(inner, ids)


def _written(first: TokenTable, merges: Sequence[tuple[str, str]]) -> list[Any]:
    """Merges in the form they had."""
    as_text = any(isinstance(pair, str) for pair in (first.document["model"].get("merges") or ())[:1])
    return [" ".join(pair) if as_text else list(pair) for pair in merges]
