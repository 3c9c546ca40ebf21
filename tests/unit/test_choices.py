"""Likelihoods of choices equal one plain forward pass a choice, whatever is shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftcli.errors import RequestError
from ftcli.evaluation.choices import Continuations, score_continuations, split_context
from ftcli.exporting.open_target import Loaded, open_target
from ftcli.layout.model import TreeModel

SHOTS = "Anna lost her cat in the garden. The cat was found by Tom.\n\nBen lost his hat on the bus. The hat was found by Mia.\n\n"
ROWS = [
    Continuations("Lily lost her ball. The ball was found by", (" Tom.", " the big brown dog.", " a")),
    Continuations("Tim was sad. ", ("He cried.", "So")),
    Continuations("Once upon a time there was a little boat. It", (" sailed.", " sank in the deep blue sea.")),
]


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return open_target("builtin:tiny", device="cpu")


def alone(tiny: Loaded, row: Continuations) -> list[float]:
    """One forward pass of the transformers model for every choice."""
    TreeModel(tiny.model, "rows")
    found = []
    for choice in row.choices:
        context, rest = split_context(row.context, choice)
        start = tiny.tokenizer.encode(context)[0]
        ids = tiny.tokenizer.encode(context + rest)[0]
        with torch.inference_mode():
            log_probs = tiny.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found.append(sum(float(log_probs[place - 1, ids[place]]) for place in range(len(start), len(ids))))
    return found


@pytest.mark.parametrize("layout", ["forest", "rows"])
@pytest.mark.parametrize("shots", ["", SHOTS], ids=["zero-shot", "few-shot"])
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_likelihoods_are_those_of_each_choice_alone(tiny: Loaded, layout: str, shots: str, batch_tokens: int) -> None:
    rows = [Continuations(shots + row.context, row.choices) for row in ROWS]
    scored = score_continuations(TreeModel(tiny.model, layout), tiny.tokenizer, rows, batch_tokens=batch_tokens)
    for row, likelihoods in zip(rows, scored.likelihoods, strict=True):
        assert [one.log_prob for one in likelihoods] == pytest.approx(alone(tiny, row), abs=1e-3)


def test_what_is_shared_is_computed_once(tiny: Loaded) -> None:
    rows = [Continuations(SHOTS + row.context, row.choices) for row in ROWS]
    scored = score_continuations(TreeModel(tiny.model, "forest"), tiny.tokenizer, rows)
    shots = len(tiny.tokenizer.encode(SHOTS)[0])
    assert scored.num_tokens_apart - scored.num_tokens > 6 * (shots - 2)
    assert scored.num_tokens < shots + sum(len(tiny.tokenizer.encode(row.context + "".join(row.choices))[0]) + 8 for row in ROWS)


def test_permuting_choices_permutes_their_likelihoods(tiny: Loaded) -> None:
    model = TreeModel(tiny.model, "forest")
    forwards = score_continuations(model, tiny.tokenizer, ROWS).likelihoods[0]
    turned = score_continuations(model, tiny.tokenizer, [Continuations(ROWS[0].context, ROWS[0].choices[::-1])]).likelihoods[0]
    assert [one.log_prob for one in turned] == pytest.approx([one.log_prob for one in forwards[::-1]], abs=1e-4)


def test_an_empty_context_begins_with_the_begin_token(tiny: Loaded) -> None:
    (found,) = score_continuations(TreeModel(tiny.model, "forest"), tiny.tokenizer, [Continuations("", ("Once upon", "zzz"))]).likelihoods
    first, tokens = tiny.tokenizer.bos_id, tiny.tokenizer.encode("Once upon")[0]
    ids = [tiny.tokenizer.eos_id if first is None else first, *tokens]
    TreeModel(tiny.model, "rows")
    with torch.inference_mode():
        log_probs = tiny.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    assert found[0].log_prob == pytest.approx(sum(float(log_probs[place, token]) for place, token in enumerate(tokens)), abs=1e-3)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_context_begins_as_the_tokenizer_begins_a_text(tiny: Loaded, adds_bos: bool) -> None:
    tokenizer = replace(tiny.tokenizer, adds_bos=adds_bos)
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    assert first is not None
    begin = tokenizer.decode([first])
    rows = [ROWS[0], Continuations(begin + ROWS[0].context, ROWS[0].choices)]
    scored = score_continuations(TreeModel(tiny.model, "forest"), tokenizer, rows)
    TreeModel(tiny.model, "rows")
    for found, has_first in zip(scored.likelihoods, (adds_bos, True), strict=True):
        before = [first] * has_first + tokenizer.encode(ROWS[0].context)[0]
        ids = [*before, *tokenizer.encode(ROWS[0].context + ROWS[0].choices[0])[0][len(before) - has_first :]]
        with torch.inference_mode():
            log_probs = tiny.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        expected = sum(float(log_probs[place - 1, ids[place]]) for place in range(len(before), len(ids)))
        assert found[0].log_prob == pytest.approx(expected, abs=1e-3)


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(tiny: Loaded) -> None:
    long = Continuations("Tom had a dog. " * 2000, ("He ran.", "She"))
    scored = score_continuations(TreeModel(tiny.model, "forest"), tiny.tokenizer, [long, ROWS[0]])
    assert scored.num_cut == 1
    assert all(one.log_prob < 0 for one in scored.likelihoods[0])


def test_an_empty_choice_is_refused(tiny: Loaded) -> None:
    with pytest.raises(RequestError, match="a choice is empty"):
        score_continuations(TreeModel(tiny.model, "forest"), tiny.tokenizer, [Continuations("Tom ran", ("", "x"))])
