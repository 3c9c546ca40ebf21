"""Labels as texts that a language model scores: one branch for each on the prompt, which is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Self

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ftcli.data.tree import TokenTree
    from ftcli.layout.batch import Batch
    from ftcli.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class LabelWords:
    """The texts of all labels as tokens."""

    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def encoded(cls, words: Sequence[str], tokenizer: Tokenizer) -> Self:
        """The words as they follow a prompt.

        Where one word is the beginning of another, all of them end with EOS: otherwise the shorter one could never be less likely.

        Raises:
            RequestError: a word has no tokens, or two have the same.
        """
        from ftcli.data.tokenise import Tokeniser

        tokeniser = Tokeniser(tokenizer)
        ids = [tuple(tokeniser.continuation(word)) for word in words]
        problems = [
            Problem(
                "objective.words", f"`{word}` has {'no tokens' if not own else 'the tokens of another word'}", "give each label its own"
            )
            for index, (word, own) in enumerate(zip(words, ids, strict=True))
            if not own or own in ids[:index]
        ]
        if problems:
            raise RequestError("the label words cannot be told apart", problems)
        begins = any(a != b and b[: len(a)] == a for a in ids for b in ids)
        if begins and tokenizer.eos_id is not None:
            ids = [(*own, tokenizer.eos_id) for own in ids]
        return cls(tuple(ids))

    @property
    def num_tokens(self) -> int:
        """Tokens that the branches add to each prompt."""
        return sum(map(len, self.ids))

    @property
    def longest(self) -> int:
        """Tokens of the longest word."""
        return max(map(len, self.ids))

    def asked_after(self, tree: TokenTree) -> tuple[TokenTree, NDArray[np.float32]]:
        """`tree`, of one path, with a branch for each label, and the weight of each of its tokens as a target."""
        import numpy as np

        from ftcli.data.tree import TokenTree

        starts = [0, *accumulate(map(len, self.ids), initial=len(tree))][:-1]
        posed = TokenTree(
            tokens=np.concatenate([tree.tokens, np.array([token for own in self.ids for token in own], dtype=np.int32)]),
            starts=np.array(starts, dtype=np.int32),
            parents=np.array([-1, *[0] * len(self.ids)], dtype=np.int32),
            spans=tree.spans,
            num_bytes=tree.num_bytes,
            row=tree.row,
            labels=tree.labels,
        )
        weights = np.zeros(len(posed), dtype=np.float32)
        weights[len(tree) :] = 1
        return posed, weights

    def scores(self, log_probs: Tensor, batch: Batch, *, is_mean: bool) -> Tensor:
        """(E, C) log-probability of each label's word, up to a constant for each example; of long words the mean over tokens."""
        import torch

        num_branches = len(batch.readout)
        sums = torch.zeros(num_branches, dtype=log_probs.dtype, device=log_probs.device).index_add(0, batch.branch, log_probs)
        scores = sums.view(-1, len(self.ids))
        return scores / torch.tensor([len(own) for own in self.ids], device=scores.device) if is_mean else scores
