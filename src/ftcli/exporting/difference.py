"""How far one model is from another: both read the same probe, and their predictions are compared token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcli.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.recipe import Recipe

NEAR_TIE = 1e-3  # two best log-probabilities nearer than this are no difference if they change places
_PROBE_TOKENS, _PROBE_LENGTH, _ROWS_PER_SOURCE = 2048, 256, 8
_PROBE_LOGITS = 2**27  # at most so many numbers are kept, half a GiB
_COMPARED_ROWS = 64
_PROBE_TEXT = """The quick brown fox jumps over the lazy dog. "How many apples are left?" asked Ada; 12 - 7 = 5, so five.
def area(width: float, height: float) -> float:
    return width * height
{"name": "lamp", "price": 19.99, "colours": ["red", "blue"]}
Übung macht den Meister. El río corre hacia el mar. 春は曙。 Once upon a time there was a small village by the sea, and
in that village lived a clockmaker who could repair anything but time itself.
"""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one model is from another on the probe."""

    kl: float
    """Mean KL divergence, nats per token; NaN where one of them predicts what is no number."""
    argmax_agreement: float
    """Share of tokens with the same most likely successor."""
    num_tokens: int

    @property
    def is_number(self) -> bool:
        """Does it say anything?"""
        return math.isfinite(self.kl)

    def line(self) -> str:
        return f"KL {self.kl:.1e} nats per token, most likely token the same for {100 * self.argmax_agreement:.2f} % of {self.num_tokens}"


def logits_on(module: nn.Module, probe: list[list[int]]) -> Tensor:
    """(tokens, vocabulary) float32 logits at every token of the probe, on the CPU; of a classifier (texts, classes)."""
    import torch

    module.eval()
    device = next(module.parameters()).device
    with torch.no_grad():
        return torch.cat(
            [module(input_ids=torch.tensor([ids], device=device), use_cache=False).logits.flatten(0, -2).float().cpu() for ids in probe]
        )


def compare(expected: Tensor, found: Tensor) -> Difference:
    """KL(expected || found) and agreement of the most likely tokens, near ties of `expected` counted as equal.

    Args:
        expected: ``(tokens, vocabulary)`` logits.
        found: ``(tokens, vocabulary)`` logits.
    """
    kl_sum, num_agreeing = 0.0, 0
    for first, second in zip(expected.split(_COMPARED_ROWS), found.split(_COMPARED_ROWS), strict=True):
        ours, theirs = first.double().log_softmax(-1), second.double().log_softmax(-1)
        terms = ours.exp() * (ours - theirs)
        kl_sum += float(terms.masked_fill(ours == -math.inf, 0.0).sum())  # what never comes counts nothing
        best = theirs.argmax(-1, keepdim=True)
        num_agreeing += int((ours.max(-1).values - ours.gather(-1, best).squeeze(-1) <= NEAR_TIE).sum())
    kl = 0.0 if kl_sum < 0.0 else kl_sum / len(expected)  # rounding; not with `max`, which makes 0 of NaN
    return Difference(kl, num_agreeing / len(expected), len(expected))


def probe_of(tokenizer: Tokenizer, recipe: Recipe | None) -> list[list[int]]:
    """Token ids to compare models on: the first rows of the run's own data, where they can still be read, and a fixed text."""
    rows = [tokenizer.encode(_PROBE_TEXT)[0]]
    if recipe is not None:
        from ftcli.data.look import look

        try:
            looks = look(recipe.data, tokenizer, _ROWS_PER_SOURCE, recipe.objective.formats)
        except RequestError:
            looks = []  # the data of an old run may be gone; the merge does not need them
        rows += [tree.tokens.tolist() for source in looks for tree in source.trees]
    rows = [row[:_PROBE_LENGTH] for row in rows if row]
    kept, num_tokens = [], 0
    for row in rows:
        if num_tokens < min(_PROBE_TOKENS, _PROBE_LOGITS // tokenizer.vocab_size):
            kept.append(row)
            num_tokens += len(row)
    return kept
