"""Examples become token trees.

A segment is encoded as one text, and its pieces are mapped to runs of tokens by character offsets. The tokens of a prompt
must be those that generation sees, where the prompt is encoded alone; where they are not, or where a token reaches over the
end of an answer, the segment is encoded in two parts instead. Between pieces that are not trained a token may reach over:
it belongs to the first. The second part stands in the middle of a text: tokenizers that
put a space before every text (Llama, BERT) encode it behind an anchor, whose tokens are dropped again.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ftcli.data.example import Piece
from ftcli.data.tree import SPAN, TokenTree
from ftcli.errors import DataError, Problem

if TYPE_CHECKING:
    import tokenizers

    from ftcli.data.example import Example, ExampleSegment
    from ftcli.models.tokenizer import Tokenizer

# What may stand before the second part of a text: characters that merge with little; the first that leaves a clean cut is used.
ANCHORS = ("\n", "a", "1", ";")

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """A segment's tokens, with the characters each of them covers."""

    ids: list[int]
    read_offsets: Callable[[], Offsets]
    cuts: list[int]
    """First token of each run: neighbouring pieces with the same part in the loss, as one piece."""
    read_end: Callable[[int], int] | None = None
    """The second of one token's offsets, where it can be had without all others."""

    @cached_property
    def offsets(self) -> Offsets:
        """Characters of the segment's text, start and end of each token; a text that stays whole needs none, and they take time."""
        return self.read_offsets()


class Tokeniser:
    """Makes token trees of examples with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(tokenizer.stop_ids)

    @cached_property
    def adds_space(self) -> bool:
        """Whether a text gets a space in front, which must not appear in the middle of an example."""
        ids, _ = self.tokenizer.encode("a")
        return self.tokenizer.decode(ids + ids) != self.tokenizer.decode(ids) * 2

    @cached_property
    def _special_bytes(self) -> dict[int, int]:
        """UTF-8 bytes of the name of each special token: they stand for no text."""
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return {token_id: len(token.content.encode()) for token_id, token in added.items() if token.special}

    @cached_property
    def _special_lengths(self) -> NDArray[np.int64]:
        """(vocabulary,) the same for every token; 0 for those that are not special."""
        lengths = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        for token_id, num_bytes in self._special_bytes.items():
            lengths[token_id] = num_bytes
        return lengths

    @cached_property
    def _added(self) -> frozenset[int]:
        """Tokens that are cut out of a text before the rest of it is encoded."""
        return frozenset(self.tokenizer.backend.get_added_tokens_decoder())

    @cached_property
    def _stripping(self) -> frozenset[int]:
        """Tokens that swallow the spaces beside them."""
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.lstrip or token.rstrip)

    def encode(self, example: Example, where: str, row: int) -> EncodedExample:
        """The example's tokens, in one tree, however long.

        Raises:
            DataError: a weight is negative or not a number, or a branch begins its text twice.
        """
        segments, first = [], 0
        for segment in example.segments:
            runs = _runs(segment, where)
            encoded = self._encode_runs(runs, is_continued=segment.parent >= 0)
            if segment.parent < 0 and example.add_bos and self.tokenizer.bos_id is not None:
                encoded = _behind(self.tokenizer.bos_id, encoded)
            segments.append(EncodedSegment(runs, encoded, segment.parent, first))
            first += len(encoded.ids)
        result = EncodedExample(tuple(segments), row, self, example.labels)
        self._check_bos(result, where)
        return result

    def has_special_within(self, example: EncodedExample) -> bool:
        """Whether a special token stands in a text elsewhere than at its ends, where BOS and EOS belong."""
        return any(not self._written_out.isdisjoint(segment.encoded.ids[1:-1]) for segment in example.segments)

    @cached_property
    def _written_out(self) -> frozenset[int]:
        """Special tokens that stand where a text names them: not that of unknown words, unless it is one of the others."""
        unknown = self.tokenizer.backend.token_to_id(self.tokenizer.special.get("unk_token", ""))
        named = {self.tokenizer.bos_id, self.tokenizer.eos_id}
        return frozenset(token_id for token_id in self._special_bytes if token_id != unknown or token_id in named)

    def _check_bos(self, example: EncodedExample, where: str) -> None:
        """Refuse a branch with two BOS: a template that writes one and an encoder that adds one go unnoticed otherwise."""
        bos = self.tokenizer.bos_id
        if bos is None or bos in self.stop_ids or bos == self.tokenizer.eos_id:
            return
        counts: list[int] = []
        for segment in example.segments:
            counts.append(segment.encoded.ids.count(bos) + (counts[segment.parent] if segment.parent >= 0 else 0))
        if max(counts) > 1:
            what = f"{max(counts)} begin-of-text tokens `{self.tokenizer.bos_token}` in one branch"
            raise DataError(
                "data cannot be used", [Problem(where, what, f"take `{self.tokenizer.bos_token}` out of the text or the template")]
            )

    def _encode_runs(self, runs: list[Piece], *, is_continued: bool) -> Encoded:
        """The runs as one text; in two parts where the tokens at a boundary are not those that generation sees."""
        if not runs:
            return Encoded([], list, [])
        text = "".join(run.text for run in runs)
        whole = self._encode_text(text, is_continued=is_continued)
        starts = [start for start, _ in whole.offsets] if len(runs) > 1 else []
        place = 0
        for number in range(1, len(runs)):
            place += len(runs[number - 1].text)
            cut = bisect_left(starts, place)
            begins = runs[number].is_trained and not runs[number - 1].is_trained
            ends = runs[number - 1].is_trained and not runs[number].is_trained
            if (begins and not self._is_clean_start(text, whole, place, cut, is_continued)) or (
                ends and not self._is_clean_end(whole, place, cut)
            ):
                before = self._encode_runs(runs[:number], is_continued=is_continued)
                after = self._encode_runs(runs[number:], is_continued=True)
                return _join(before, after, place)
            whole.cuts.append(cut)
        return whole

    def _is_clean_start(self, text: str, whole: Encoded, place: int, cut: int, is_continued: bool) -> bool:
        """Whether the tokens before an answer are those of the prompt alone, which is what generation sees.

        That no token reaches over is not enough: how spaces at the end of a prompt are cut depends on what follows them.
        Only the text from the last special token on needs to be tried, since text is cut at these first.
        """
        if _reaches_over(whole, place, cut):
            return False
        first = next((at for at in range(cut - 1, -1, -1) if whole.ids[at] in self._added), None)
        if first is None:
            return self._encode_text(text[:place], is_continued=is_continued).ids == whole.ids[:cut]
        return self.tokenizer.encode(text[whole.offsets[first][0] : place])[0] == whole.ids[first:cut]

    def _is_clean_end(self, whole: Encoded, place: int, cut: int) -> bool:
        """Whether no token covers the end of an answer and what follows, but for an end-of-turn token that swallows a line break."""
        return not _reaches_over(whole, place, cut) or whole.ids[cut - 1] in self._stripping

    def continuation(self, text: str) -> list[int]:
        """The tokens of a text that follows another, without a space in front that is not there."""
        return self._encode_text(text, is_continued=True).ids

    def _encode_text(self, text: str, *, is_continued: bool) -> Encoded:
        """A text as one run, without a space in front that is not there where it continues another."""
        if not is_continued or not text or not self.adds_space:
            return _encoded(self.tokenizer.encoding(text))
        for anchor in ANCHORS:
            ids, offsets = self.tokenizer.encode(anchor + text)
            cut = bisect_left([start for start, _ in offsets], len(anchor))
            if cut == 0 or offsets[cut - 1][1] <= len(anchor):
                moved = [(start - len(anchor), end - len(anchor)) for start, end in offsets[cut:]]
                return Encoded(ids[cut:], moved.copy, [0])
        return _encoded(self.tokenizer.encoding(text))


def _runs(segment: ExampleSegment, where: str) -> list[Piece]:
    """The segment's pieces, neighbours with the same part in the loss joined, empty ones left out."""
    for piece in segment.pieces:
        if not (math.isfinite(piece.weight) and piece.weight >= 0):
            raise DataError("data cannot be used", [Problem(where, f"weight is {piece.weight}", "weights are numbers from 0 up")])
    pieces = [piece for piece in segment.pieces if piece.text]
    groups = groupby(pieces, key=lambda piece: (piece.weight, piece.is_prompt))
    return [Piece("".join(piece.text for piece in group), weight, is_prompt) for (weight, is_prompt), group in groups]


def _reaches_over(encoded: Encoded, place: int, cut: int) -> bool:
    """Whether the token before `cut` covers characters on both sides of `place`."""
    return cut > 0 and encoded.offsets[cut - 1][1] > place


def _join(before: Encoded, after: Encoded, place: int) -> Encoded:
    """Two parts of a segment's text, of which the second begins at character `place`."""
    num_before = len(before.ids)
    return Encoded(
        before.ids + after.ids,
        lambda: before.offsets + [(start + place, end + place) for start, end in after.offsets],
        before.cuts + [cut + num_before for cut in after.cuts],
    )


def _encoded(encoding: tokenizers.Encoding) -> Encoded:
    def read_end(token: int) -> int:
        bounds = encoding.token_to_chars(token)
        assert bounds is not None, "every token of a text has its place in it"
        return bounds[1]

    return Encoded(encoding.ids, lambda: encoding.offsets, [0], read_end)


def _behind(token_id: int, encoded: Encoded) -> Encoded:
    """The tokens behind one that stands for no text."""
    read_end = encoded.read_end
    return Encoded(
        [token_id, *encoded.ids],
        lambda: [(0, 0), *encoded.offsets],
        [cut + 1 for cut in encoded.cuts],
        None if read_end is None else lambda token: read_end(token - 1) if token else 0,
    )


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    runs: list[Piece]
    encoded: Encoded
    parent: int
    first: int
    """Tokens of the tree before this segment."""

    def run_bounds(self) -> list[tuple[Piece, int, int]]:
        """Each run with its first token and the one after its last, in tokens of the segment."""
        ends = [*self.encoded.cuts, len(self.encoded.ids)][1:]
        return list(zip(self.runs, self.encoded.cuts, ends, strict=True))


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example's tokens before they are fitted to the maximum length."""

    segments: tuple[EncodedSegment, ...]
    row: int
    tokeniser: Tokeniser
    labels: tuple[str, ...] | None = None

    @property
    def longest_branch(self) -> int:
        """Tokens along the longest branch."""
        depths: list[int] = []
        for segment in self.segments:
            depths.append(len(segment.encoded.ids) + (depths[segment.parent] if segment.parent >= 0 else 0))
        return max(depths)

    @property
    def is_path(self) -> bool:
        return len(self.segments) == 1

    def has_target(self) -> bool:
        """Whether there is a label, or a token to learn as part of an answer."""
        if self.labels is not None:
            return any(run.weight > 0 for segment in self.segments for run in segment.runs)
        return any(run.is_trained and end > start for segment in self.segments for run, start, end in segment.run_bounds())

    def every_turn_stops(self) -> bool:
        """Whether each trained run has a token in it at which generation stops."""
        stop_ids = self.tokeniser.stop_ids
        trained = (
            segment.encoded.ids[start:end] for segment in self.segments for run, start, end in segment.run_bounds() if run.is_trained
        )
        return all(not stop_ids.isdisjoint(ids) for ids in trained)

    def num_bytes(self) -> int:
        """UTF-8 bytes of the trained text, special tokens not counted."""
        special = self.tokeniser._special_bytes
        total = 0
        for segment in self.segments:
            for run, start, end in segment.run_bounds():
                if run.is_trained:
                    ids = segment.encoded.ids[start:end]
                    total += len(run.text) if run.text.isascii() else len(run.text.encode("utf-8", "surrogatepass"))
                    total -= sum(special[token_id] * ids.count(token_id) for token_id in special.keys() & set(ids))
        return total

    def token_bytes(self) -> NDArray[np.int64]:
        """(n,) UTF-8 bytes of the trained text that each token stands for; they add up to `num_bytes`.

        A character in several tokens counts for the first of them, and text in no token for the one after it.
        """
        result = np.zeros(sum(len(segment.encoded.ids) for segment in self.segments), dtype=np.int64)
        for segment in self.segments:
            place = 0
            # Answers in a row are one text: a token may cover the end of one and the start of the next.
            for is_trained, group in groupby(segment.run_bounds(), key=lambda bounds: bounds[0].is_trained):
                runs = list(group)
                text, start, end = "".join(run.text for run, _, _ in runs), runs[0][1], runs[-1][2]
                if is_trained and end > start:
                    stops = np.fromiter(chain.from_iterable(segment.encoded.offsets[start:end]), np.int64, 2 * (end - start))[1::2]
                    reached = np.clip(stops - place, 0, len(text))
                    reached[-1] = len(text)
                    covered = _bytes_before(text)[np.maximum.accumulate(reached)]
                    special = self.tokeniser._special_lengths[_as_array(segment.encoded.ids[start:end])]
                    result[segment.first + start : segment.first + end] = np.diff(covered, prepend=0) - special
                place += len(text)
        return result

    def bytes_between(self) -> Callable[[int, int], int]:
        """What gives the UTF-8 bytes of trained text that tokens `first` to `end`, end excluded, stand for."""
        segment = self.segments[0]
        run, read_end, ids = segment.runs[0] if segment.runs else None, segment.encoded.read_end, segment.encoded.ids
        if run is None or not (self.is_path and len(segment.runs) == 1 and run.is_trained and read_end and run.text.isascii()):
            each = self.token_bytes()
            return lambda first, end: int(each[first:end].sum())
        # Tokens of ASCII follow each other in the text, so that ends are enough: a long text has many tokens, and few cuts.
        lengths, begin = self.tokeniser._special_bytes, segment.encoded.cuts[0]
        special = {token_id: lengths[token_id] for token_id in lengths.keys() & set(ids)}

        def reached(token: int) -> int:
            if token == len(ids):
                return len(run.text)
            return min(read_end(token - 1), len(run.text)) if token else 0

        def between(first: int, end: int) -> int:
            # A token before the text is no part of it.
            part = ids[max(first, begin) : end]
            return reached(end) - reached(first) - sum(num_bytes * part.count(token_id) for token_id, num_bytes in special.items())

        return between

    def tree(self) -> TokenTree:
        """The whole example as one tree."""
        spans: list[tuple[int, int, float, bool]] = []
        for segment in self.segments:
            for run, start, end in segment.run_bounds():
                if run.weight > 0 and end > start:
                    spans.append((segment.first + start, segment.first + end, run.weight, run.is_prompt))
        return TokenTree(
            tokens=_as_array([token_id for segment in self.segments for token_id in segment.encoded.ids]),
            starts=np.array([segment.first for segment in self.segments], dtype=np.int32),
            parents=np.array([segment.parent for segment in self.segments], dtype=np.int32),
            spans=np.array(spans, dtype=SPAN),
            num_bytes=self.num_bytes(),
            row=self.row,
            labels=self.labels,
        )


def _as_array(ids: list[int]) -> NDArray[np.int32]:
    """Token ids as numbers of 4 bytes; numpy takes several times as long to look at each of a list."""
    return np.array(array("i", ids), dtype=np.int32)


def _bytes_before(text: str) -> NDArray[np.int64]:
    """(characters + 1,) UTF-8 bytes before each character, and of the whole text."""
    if text.isascii():
        return np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    lengths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(lengths)])


def num_targets(tree: TokenTree) -> int:
    """Tokens that are learnt as answers: no prompt, weight above 0, and with a token before them; what has a label is one target."""
    if tree.labels is not None:
        return 1
    return sum(end - max(start, 1) for start, end, weight, is_prompt in tree.spans.tolist() if weight > 0 and not is_prompt)


def digest(tree: TokenTree) -> int:
    """A 64-bit number that equal trees share: same tokens in the same branches, whatever is trained of them."""
    content = hashlib.blake2b(tree.tokens.tobytes(), digest_size=8)
    if len(tree.starts) > 1:
        content.update(tree.starts.tobytes() + tree.parents.tobytes())
    return int.from_bytes(content.digest(), "little")
