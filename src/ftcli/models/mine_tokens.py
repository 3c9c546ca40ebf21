"""The words of a corpus that would save the most tokens as tokens of their own.

A word is what stands behind a space: its token holds the space and is nothing at the start of a line, where it is not counted. In
scripts that put no spaces between words, it is a string of characters that comes often.
"""

from __future__ import annotations

import bisect
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftcli.models.add_tokens import UNSPACED

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

# A word with the space before it: what is one token in the middle of a text. Or a run of characters without spaces.
_WORD = re.compile(rf" (?![{UNSPACED}])[^\W\d_](?:(?![{UNSPACED}])[\w-])+|[{UNSPACED}]{{2,}}")
MAX_WORDS = 2_000_000
MAX_RUN_CHARS = 1_000_000
"""Of text without spaces, which is kept whole; the rest is not looked at."""
LONGEST_STRING = 6
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
    """Words of a corpus, each with a space in front, and how often they stand there; the rarest are forgotten when there are too many.

    Of scripts without spaces whole runs of characters, without a space in front.

    Example:
        >>> dict(count_words(["Two rows, two rows"]))
        {' rows': 2, ' two': 1}
    """
    counts: Counter[str] = Counter()
    room = MAX_RUN_CHARS
    for text in texts:
        for word in _WORD.findall(text):
            if word[0] != " ":
                if room <= 0:
                    continue
                room -= len(word)
            counts[word] += 1
        floor = 1
        while len(counts) > MAX_WORDS:
            counts = Counter({word: count for word, count in counts.items() if count > floor})
            floor *= 2
    return counts


def mine_tokens(counts: Counter[str], tokenizer: Tokenizer, num_tokens: int) -> list[MinedToken]:
    """The `num_tokens` words that save the most, best first; fewer where no other saves anything.

    A new token is also cut out of every longer word that begins with it, which may save tokens there or cost some; both count.
    Words are chosen one by one, each for what it saves after those chosen before. What strings of a script without spaces save is
    estimated: each is cut out of its text as if its neighbours' tokens stayed as they are.
    """
    words = Counter({word: count for word, count in counts.items() if word[0] == " "})
    runs = {run: count for run, count in counts.items() if run[0] != " "}
    found = [*_Mine(words, tokenizer).best(num_tokens), *_best_strings(runs, tokenizer, num_tokens)]
    return sorted(found, key=lambda token: -token.saved)[:num_tokens]


def _best_strings(runs: Mapping[str, int], tokenizer: Tokenizer, num_tokens: int) -> list[MinedToken]:
    """Strings of characters that save the most, best first, each in what those before it have left of the text."""
    counts: Counter[str] = Counter()
    for run, times in runs.items():
        for size in range(2, LONGEST_STRING + 1):
            for start in range(len(run) - size + 1):
                counts[run[start : start + size]] += times
    often = sorted((string for string, count in counts.items() if count > 1), key=lambda string: (-counts[string] * len(string), string))
    candidates = often[: _CANDIDATES * num_tokens * LONGEST_STRING]
    pieces = {string: len(ids) for string, (ids, _) in zip(candidates, tokenizer.encode_batch(candidates), strict=True)}
    heap = [(-counts[string] * (pieces[string] - 1), string) for string in candidates if pieces[string] > 1]
    heapq.heapify(heap)
    text = "\n".join("\n".join([run] * times) for run, times in sorted(runs.items()))
    found: list[MinedToken] = []
    while heap and len(found) < num_tokens:
        _, string = heapq.heappop(heap)
        count = text.count(string)
        saved = count * (pieces[string] - 1)
        if heap and -saved > heap[0][0]:
            heapq.heappush(heap, (-saved, string))
        elif count > 1:
            found.append(MinedToken(string, count, pieces[string], saved))
            text = text.replace(string, "\n")
        else:
            break
    return found


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
