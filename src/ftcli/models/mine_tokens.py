"""The words of a corpus that would save the most tokens as tokens of their own."""

from __future__ import annotations

import bisect
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

# A word with the space before it: what is one token in the middle of a text.
_WORD = re.compile(r" [^\W\d_][\w-]+")
MAX_WORDS = 2_000_000
_CANDIDATES = 20


@dataclass(frozen=True, slots=True)
class MinedToken:
    """A word, and what it is worth."""

    text: str
    count: int
    """How often it stands in the corpus, as a word or at the beginning of one."""
    pieces: int
    """Tokens it is now."""
    saved: int
    """Tokens that the corpus has fewer, after those before it in the list."""


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Words of a corpus, each with a space in front, and how often they stand there; the rarest are forgotten when there are too many."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text))
        floor = 1
        while len(counts) > MAX_WORDS:
            counts = Counter({word: count for word, count in counts.items() if count > floor})
            floor *= 2
    return counts


def mine_tokens(counts: Counter[str], tokenizer: Tokenizer, num_tokens: int) -> list[MinedToken]:
    """The `num_tokens` words that save the most, best first; fewer where no other saves anything.

    A new token is also cut out of every longer word that begins with it, which may save tokens there or cost some; both count.
    Words are chosen one by one, each for what it saves after those chosen before.
    """
    return _Mine(counts, tokenizer).best(num_tokens)


@dataclass
class _Mine:
    counts: Counter[str]
    tokenizer: Tokenizer
    chosen: dict[str, str] = field(default_factory=dict)
    """For words that begin with a chosen token, the longest such token."""
    lengths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.words = sorted(self.counts)
        encoded = self.tokenizer.encode_batch(self.words)
        self.lengths = {word: len(ids) for word, (ids, _) in zip(self.words, encoded, strict=True)}

    def best(self, num_tokens: int) -> list[MinedToken]:
        worth = {word: self.counts[word] * (self.lengths[word] - 1) for word in self.words if self.lengths[word] > 1}
        candidates = sorted(worth, key=lambda word: (-worth[word], word))[: _CANDIDATES * num_tokens]
        heap = [(-self._saved(word), word) for word in candidates]
        heapq.heapify(heap)
        found: list[MinedToken] = []
        while heap and len(found) < num_tokens:
            _, word = heapq.heappop(heap)
            saved = self._saved(word)
            if heap and -saved > heap[0][0]:
                heapq.heappush(heap, (-saved, word))
                continue
            if saved <= 0:
                break
            inside = list(self._beginning_with(word))
            found.append(MinedToken(word, sum(self.counts[other] for other in inside), self.lengths[word], saved))
            for other in inside:
                if len(self.chosen.get(other, "")) < len(word):
                    self.chosen[other] = word
        return found

    def _saved(self, token: str) -> int:
        """Tokens that the corpus would have fewer with one more token."""
        saved = 0
        for word in self._beginning_with(token):
            now = self.chosen.get(word, "")
            if len(now) < len(token):
                saved += self.counts[word] * (self._length(word, now) - self._length(word, token))
        return saved

    def _length(self, word: str, token: str) -> int:
        """Tokens of a word when `token` is cut out of its beginning."""
        if not token:
            return self.lengths[word]
        rest = word[len(token) :]
        if rest not in self.lengths:
            self.lengths[rest] = len(self.tokenizer.encode(rest)[0]) if rest else 0
        return 1 + self.lengths[rest]

    def _beginning_with(self, token: str) -> Iterator[str]:
        for index in range(bisect.bisect_left(self.words, token), len(self.words)):
            if not self.words[index].startswith(token):
                return
            yield self.words[index]
