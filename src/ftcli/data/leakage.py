"""Rows of evaluation data that training data gives away, and rows that repeat or contradict each other.

Kinds of hit, from certain to likely; each row is reported under the first that fits:

    exact      the same text
    same-words the same words: case, Unicode form, spaces and punctuation aside
    quoted     its n-grams of words stand in a longer text: at least `min_quoted` of them
    near       it shares most of its character n-grams with another row, or differs from it in one of at least eight words

Texts are read a row at a time. Kept are 64-bit digests: of whole texts, of the evaluation rows' word n-grams, and of `NUM_PERMUTATIONS`
minima a row for near duplicates. Candidates of MinHash are always counted out on the texts, so a hit is never an accident of hashing.
Sources: Broder 1997 (resemblance, MinHash); 13-grams: Brown et al. 2020, arXiv:2005.14165, appendix C.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Digests = NDArray[np.uint64]

NUM_PERMUTATIONS, ROWS_PER_BAND = 96, 3
CHARACTERS = 4
"""Length of the character n-grams of near duplicates: short rows with one word changed still share most of them."""
MIN_WORDS, MAX_WORDS = 5, 13
# Shorter rows that differ in one word often ask different things; of longer ones the n-grams see it.
MIN_WORDS_FOR_ONE_OFF, MAX_WORDS_FOR_ONE_OFF = 8, 40
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Text:
    """One row as the audit sees it."""

    where: str
    """File and line."""
    question: str
    answer: str
    """Empty where the row is a text alone."""

    @property
    def words(self) -> list[str]:
        return words_of(self.question)


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that another one gives away."""

    kind: str
    where: str
    other: str
    """The row it was found in."""
    share: float
    """Of its n-grams that the other one has; 1 for equal texts."""


@dataclass(slots=True)
class Leakage:
    """What was found, in the order of the rows."""

    num_train: int = 0
    num_evaluation: int = 0
    leaked: list[Hit] = field(default_factory=list)
    """Evaluation rows found in training rows."""
    repeated: list[Hit] = field(default_factory=list)
    """Training rows that repeat an earlier one."""
    repeated_evaluation: list[Hit] = field(default_factory=list)
    conflicts: list[Hit] = field(default_factory=list)
    """Rows with the question of an earlier one and another answer."""

    def counts(self, hits: Sequence[Hit]) -> dict[str, int]:
        """Hits by kind."""
        found: dict[str, int] = {}
        for hit in hits:
            found[hit.kind] = found.get(hit.kind, 0) + 1
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def words_of(text: str) -> list[str]:
    """The words of a text: Unicode form, case, spaces and punctuation aside.

    Example:
        >>> words_of("  Don't PANIC\\u00a0- \\ufb01ne! ")
        ['don', 't', 'panic', 'fine']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def read_text(row: Mapping[str, Any], where: str) -> Text:
    """Question and answer of a row of any known format: its last text is the answer where there are several.

    Example:
        >>> read_text({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, "a:1")
        Text(where='a:1', question='hi', answer='hello')
    """
    parts = [part for value in row.values() for part in _strings(value)]
    if len(parts) <= 1:
        return Text(where, "".join(parts), "")
    return Text(where, "\n".join(parts[:-1]), parts[-1])


def _strings(value: Any) -> Iterator[str]:
    """The texts in a value: of a message its content alone, not its role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        content = value.get("content", value.get("value"))
        for item in (content,) if content is not None else value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def find_leakage(
    train: Iterable[Text], evaluation: Iterable[Text], *, min_near: float = 0.6, min_quoted: float = 0.8, ngram: int = MAX_WORDS
) -> Leakage:
    """Everything that repeats within and between the two.

    Args:
        min_near: share of common character n-grams (Jaccard) from which two texts are near duplicates.
        min_quoted: share of an evaluation row's word n-grams that must stand in one training row.
        ngram: words in an n-gram; shorter rows are looked for with as many words as they have, `MIN_WORDS` at least.
    """
    learnt, held_out = _Rows(train), _Rows(evaluation)
    found = Leakage(len(learnt.texts), len(held_out.texts))
    index = _Index(learnt.texts)
    quoted = _quotations(learnt.texts, held_out.texts, ngram, min_quoted)
    for place, text in enumerate(held_out.texts):
        hit = index.equal(text) or quoted.get(place) or _nearest(held_out, place, learnt, len(learnt.texts), min_near)
        if hit is not None:
            found.leaked.append(hit)
    found.repeated = _repeated(learnt, min_near)
    found.repeated_evaluation = _repeated(held_out, min_near)
    found.conflicts = _conflicts([*learnt.texts, *held_out.texts])
    return found


def find_given_away(train: Iterable[Text], evaluation: Iterable[Text]) -> list[Hit]:
    """Evaluation rows that stand whole in training rows, by their words, question and answer alike: a quick look without near duplicates.

    Rows of fewer than `MIN_WORDS` words are left out: equal ones say little.
    """
    learnt, held_out = (
        [Text(text.where, f"{text.question}\n{text.answer}".strip(), "") for text in texts] for texts in (train, evaluation)
    )
    held_out = [text for text in held_out if len(text.words) >= MIN_WORDS]
    index, quoted = _Index(learnt), _quotations(learnt, held_out, MAX_WORDS, 1.0)
    hits = [index.equal(text) or quoted.get(place) for place, text in enumerate(held_out)]
    return [hit for hit in hits if hit is not None]


class _Rows:
    """Texts with their character n-grams and the buckets of MinHash that they fall into."""

    def __init__(self, texts: Iterable[Text]) -> None:
        self.texts = list(texts)
        self.grams = [character_ngrams(text) for text in self.texts]
        self.keys = [_signature(grams) + _without_a_word(text.words) for grams, text in zip(self.grams, self.texts, strict=True)]
        self.buckets: dict[int, list[int]] = defaultdict(list)
        for place, keys in enumerate(self.keys):
            for key in keys:
                self.buckets[key].append(place)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _Index:
    """Whole texts and their words, by digest."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.exact: dict[int, str] = {}
        self.words: dict[int, str] = {}
        for text in texts:
            self.add(text)

    def add(self, text: Text) -> None:
        self.exact.setdefault(_digest(text.question), text.where)
        self.words.setdefault(_digest(" ".join(text.words)), text.where)

    def equal(self, text: Text) -> Hit | None:
        """The first row with the same text, or the same words."""
        if not text.words:
            return None
        other = self.exact.get(_digest(text.question))
        if other is not None:
            return Hit("exact", text.where, other, 1.0)
        other = self.words.get(_digest(" ".join(text.words)))
        return None if other is None else Hit("same-words", text.where, other, 1.0)


def _word_ngrams(words: Sequence[str], size: int) -> list[int]:
    return [_digest(" ".join(words[start : start + size])) for start in range(len(words) - size + 1)]


def _quotations(learnt: Sequence[Text], held_out: Sequence[Text], ngram: int, min_quoted: float) -> dict[int, Hit]:
    """For each evaluation row the training row that holds most of its word n-grams, answers included."""
    wanted: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # n-gram size -> digest -> evaluation rows
    totals: dict[int, int] = {}
    for place, text in enumerate(held_out):
        words = text.words
        size = min(ngram, len(words))
        if size >= MIN_WORDS:
            grams = set(_word_ngrams(words, size))
            totals[place] = len(grams)
            for gram in grams:
                wanted[size][gram].append(place)
    best: dict[int, Hit] = {}
    for text in learnt:
        words = words_of(f"{text.question}\n{text.answer}")
        counts: dict[int, int] = defaultdict(int)
        for size, places in wanted.items():
            for gram in set(_word_ngrams(words, size)):
                for place in places.get(gram, ()):
                    counts[place] += 1
        for place, count in counts.items():
            share = count / totals[place]
            if share >= min_quoted and (place not in best or share > best[place].share):
                best[place] = Hit("quoted", held_out[place].where, text.where, share)
    return best


def _nearest(rows: _Rows, place: int, others: _Rows, before: int, min_near: float) -> Hit | None:
    """The row of `others`, among the first `before`, that is most like row `place`, if it is like it enough."""
    best: Hit | None = None
    candidates = {other for key in rows.keys[place] for other in others.buckets.get(key, ()) if other < before}
    for other in sorted(candidates):
        share = _jaccard(rows.grams[place], others.grams[other])
        is_near = share >= min_near or _is_one_word_off(rows.texts[place].words, others.texts[other].words)
        if is_near and (best is None or share > best.share):
            best = Hit("near", rows.texts[place].where, others.texts[other].where, share)
    return best


def _without_a_word(words: Sequence[str]) -> list[int]:
    """Keys that rows share which differ in one word: the words before and after each place. Of long rows, n-grams see it."""
    if not MIN_WORDS_FOR_ONE_OFF <= len(words) <= MAX_WORDS_FOR_ONE_OFF:
        return []
    return [_digest(f"{' '.join(words[:place])}\0{' '.join(words[place + 1 :])}") for place in range(len(words))]


def _is_one_word_off(words: Sequence[str], others: Sequence[str]) -> bool:
    if len(words) != len(others) or not MIN_WORDS_FOR_ONE_OFF <= len(words) <= MAX_WORDS_FOR_ONE_OFF:
        return False
    return sum(word != other for word, other in zip(words, others, strict=True)) <= 1


def _repeated(rows: _Rows, min_near: float) -> list[Hit]:
    """Rows that repeat an earlier one: the same text, the same words, or nearly the same."""
    index, hits = _Index(()), []
    for place, text in enumerate(rows.texts):
        hit = index.equal(text) or _nearest(rows, place, rows, place, min_near)
        if hit is not None:
            hits.append(hit)
        index.add(text)
    return hits


def _conflicts(texts: Sequence[Text]) -> list[Hit]:
    """Rows whose question an earlier row has answered otherwise."""
    answers: dict[int, Text] = {}
    hits = []
    for text in texts:
        if text.answer and text.words:
            first = answers.setdefault(_digest(" ".join(text.words)), text)
            if words_of(first.answer) != words_of(text.answer):
                hits.append(Hit("conflict", text.where, first.where, 1.0))
    return hits


def character_ngrams(text: Text) -> Digests:
    """Sorted digests of the text's character n-grams, words one space apart."""
    import numpy as np

    plain = f" {' '.join(text.words)} ".encode("utf-32-le")
    codes = np.frombuffer(plain, dtype=np.uint32).astype(np.uint64)
    if len(codes) < CHARACTERS + 2:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, CHARACTERS)
    return np.unique(mixed(windows @ (np.uint64(0x9E3779B1) ** np.arange(CHARACTERS, dtype=np.uint64))))


def mixed(values: Digests) -> Digests:
    """A bijection of 64-bit numbers that spreads them evenly. Source: Steele et al. 2014, the finaliser of SplitMix64."""
    import numpy as np

    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def minima(grams: Digests) -> Digests:
    """(NUM_PERMUTATIONS,) MinHash: the share of equal minima of two texts is an estimate of their Jaccard similarity.

    Args:
        grams: digests of a text's n-grams, one at least. They are spread evenly already, so that a product with an odd number, a
            bijection that costs one operation, permutes them well enough (Dietzfelbinger et al. 1997).
    """
    import numpy as np

    odd = mixed(np.arange(1, NUM_PERMUTATIONS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
    smallest: Digests = (grams[None, :] * odd[:, None]).min(axis=1)
    return smallest


def _signature(grams: Digests) -> list[int]:
    """One key a band: rows that share a key are candidates."""
    import numpy as np

    if not len(grams):
        return []
    bands = minima(grams).reshape(-1, ROWS_PER_BAND)
    keys = np.arange(len(bands), dtype=np.uint64)
    for column in range(ROWS_PER_BAND):
        keys = mixed(keys ^ bands[:, column])
    return [int(key) for key in keys]


def _jaccard(a: Digests, b: Digests) -> float:
    import numpy as np

    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common) if common else 0.0
