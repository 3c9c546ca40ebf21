"""How much of a text a union of vocabularies cuts as each of its models did: what a model sees otherwise it was not trained on.

A union keeps every token and every merge, and still cuts some words at other places: a pair that only one model merges is merged for
the other, too.
"""

from __future__ import annotations

import gzip
import itertools
import json
from typing import TYPE_CHECKING

from ftcli.builtin.catalogue import dataset_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tokenizers import Tokenizer

    from ftcli.merging.planned import Plan

_ROWS = 200  # stories of about 500 characters


def cut_warnings(plan: Plan) -> list[str]:
    """Of a union: for every model the share of its tokens that are cut alike, where it is not all of them."""
    settings, vocabulary = plan.recipe.tokenizer, plan.vocabulary
    if settings is None or settings.source != "union" or vocabulary is None or vocabulary.table is None:
        return []
    from tokenizers import Tokenizer

    union, texts = _opened(vocabulary.table.document), _texts()
    found = []
    for source in plan.sources:
        share = share_alike(union, Tokenizer.from_file(str(source.tokenizer_folder / "tokenizer.json")), texts)
        if share < 1:
            what = f"the union cuts {100 * share:.1f} % of its tokens of English stories alike"
            found.append(
                f"`{source.reference}`: {what}; the rest it sees in pieces that it was not trained on: train on, or `source: base`"
            )
    return found


def share_alike(union: Tokenizer, own: Tokenizer, texts: list[str]) -> float:
    """The share of the tokens that `own` cuts `texts` into, 0..1, which `union` cuts out at the same places."""
    alike = total = 0
    for text in texts:
        theirs = own.encode(text, add_special_tokens=False)
        ours = union.encode(text, add_special_tokens=False)
        places = set(zip(ours.tokens, ours.offsets, strict=True))
        alike += sum(piece in places for piece in zip(theirs.tokens, theirs.offsets, strict=True))
        total += len(theirs.tokens)
    return alike / total if total else 1.0


def _opened(document: Mapping[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(document))


def _texts() -> list[str]:
    with gzip.open(dataset_path("stories", "test"), "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in itertools.islice(file, _ROWS)]
