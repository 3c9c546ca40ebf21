"""Texts ranked by the words they share with a query, and passages of documents with such an index, kept between calls.

Source of the ranking: Robertson & Zaragoza 2009, section 3 (BM25), k1 = 1.2, b = 0.75. Equal scores keep the order of the texts, so
the same texts and query give the same answer everywhere.
Legend: ``N`` texts, ``W`` different words, ``P`` pairs of a word and a text it stands in.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftcli.data.leakage import words_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

K1, B = 1.2, 0.75
FORMAT = 1
"""Of kept indices; a change of how they are made raises it."""
_WORD = re.compile(r"\S+")


class Bm25:
    """An index of texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        import numpy as np

        found: dict[str, list[tuple[int, int]]] = {}
        lengths = []
        for place, text in enumerate(texts):
            counts = Counter(words_of(text))
            lengths.append(sum(counts.values()))
            for word, count in counts.items():
                found.setdefault(word, []).append((place, count))
        pairs = np.array([pair for listed in found.values() for pair in listed], dtype=np.int32).reshape(-1, 2)
        sizes = [len(listed) for listed in found.values()]
        self._fill(list(found), np.cumsum([0, *sizes]).astype(np.int64), pairs, np.array(lengths, dtype=np.int32))

    def _fill(self, words: Sequence[str], starts: NDArray[np.int64], pairs: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
        """
        Args:
            starts: ``(W + 1,)`` where each word's pairs begin.
            pairs: ``(P, 2)`` a text and how often the word stands in it.
            lengths: ``(N,)`` words of each text.
        """
        self.words = {word: index for index, word in enumerate(words)}
        self.starts, self.pairs, self.lengths = starts, pairs, lengths
        self.mean_length = max(1.0, float(lengths.mean())) if len(lengths) else 1.0

    def scores(self, query: str) -> NDArray[np.float64]:
        """``(N,)`` how well each text answers the query; 0 where no word is shared."""
        import numpy as np

        scores = np.zeros(len(self.lengths))
        for word in dict.fromkeys(words_of(query)):
            index = self.words.get(word)
            if index is None:
                continue
            places, counts = self.pairs[self.starts[index] : self.starts[index + 1]].T
            weight = np.log(1 + (len(scores) - len(places) + 0.5) / (len(places) + 0.5))
            shrunk = K1 * (1 - B + B * self.lengths[places] / self.mean_length)
            scores[places] += weight * counts * (K1 + 1) / (counts + shrunk)
        return scores

    def nearest(self, query: str, count: int) -> list[int]:
        """Places of the best texts, the best first; of equal ones the earlier, and earlier texts where nothing is shared.

        Example:
            >>> Bm25(["a cat sat", "a dog ran", "the cat and the dog"]).nearest("dog and cat", 2)
            [2, 0]
        """
        import numpy as np

        return [int(place) for place in np.argsort(-self.scores(query), kind="stable")[:count]]

    def save(self, path: Path) -> None:
        """Write the index as one safetensors file; its words stand in a file beside it."""
        from safetensors.numpy import save_file

        path.with_suffix(".words").write_text("\n".join(self.words), encoding="utf-8")
        save_file({"starts": self.starts, "pairs": self.pairs, "lengths": self.lengths}, path)

    @classmethod
    def load(cls, path: Path) -> Bm25:
        from safetensors.numpy import load_file

        text = path.with_suffix(".words").read_text(encoding="utf-8")
        arrays = load_file(path)
        index = cls.__new__(cls)
        index._fill(text.split("\n") if text else [], arrays["starts"], arrays["pairs"], arrays["lengths"])
        return index


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document, as it may stand in a prompt."""

    where: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Passages:
    """Passages with their index."""

    passages: Sequence[Passage]
    index: Bm25
    num_bytes: int
    """Of the index on the disk; 0 where it is in memory only."""

    def search(self, query: str, count: int, *, without: str = "") -> list[Passage]:
        """The best passages that share a word with the query, the best first.

        Args:
            without: leave out passages that hold this text, word for word: a training row must not be handed its own answer.
        """
        import numpy as np

        scores, unwanted = self.index.scores(query), " ".join(words_of(without))
        found: list[Passage] = []
        for place in np.argsort(-scores, kind="stable"):
            if scores[place] <= 0 or len(found) == count:
                break
            passage = self.passages[place]
            if not unwanted or f" {unwanted} " not in f" {' '.join(words_of(passage.text))} ":
                found.append(passage)
        return found


def cut_passages(text: str, num_words: int, overlap: int) -> list[str]:
    """`text` in pieces of at most `num_words` words, each beginning `overlap` words before the last one's end.

    Example:
        >>> cut_passages("a b  c d e", 3, 1)
        ['a b  c', 'c d e']
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    pieces, start = [], 0
    while start < len(spans):
        end = min(start + num_words, len(spans))
        pieces.append(text[spans[start][0] : spans[end - 1][1]])
        if end == len(spans):
            break
        start = end - overlap
    return pieces


def index_passages(documents: Iterable[Passage], num_words: int, overlap: int, kept: Path | None) -> Passages:
    """Cut and index documents, or take what stands in the folder `kept` from an earlier call.

    Args:
        documents: read only if nothing is kept.
    """
    from ftcli.files import new_folder

    if kept is None or not kept.is_dir():
        cut = [Passage(one.where, piece) for one in documents for piece in cut_passages(one.text, num_words, overlap)]
        index = Bm25([passage.text for passage in cut])
        if kept is None:
            return Passages(cut, index, 0)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(kept) as partial:
            lines = [json.dumps([passage.where, passage.text], ensure_ascii=False) + "\n" for passage in cut]
            (partial / "passages.jsonl").write_text("".join(lines), encoding="utf-8")
            index.save(partial / "index.safetensors")
    lines = (kept / "passages.jsonl").read_text(encoding="utf-8").split("\n")
    passages = [Passage(*json.loads(line)) for line in lines if line]
    size = sum(path.stat().st_size for path in kept.iterdir())
    return Passages(passages, Bm25.load(kept / "index.safetensors"), size)
