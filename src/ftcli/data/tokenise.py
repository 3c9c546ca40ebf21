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
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ftcli.data.example import Piece
from ftcli.data.tree import SPAN, TokenTree
from ftcli.errors import DataError, Problem

if TYPE_CHECKING:
    from ftcli.data.example import Example, ExampleSegment
    from ftcli.models.tokenizer import Tokenizer

# What may stand before the second part of a text: characters that merge with little; the first that leaves a clean cut is used.
ANCHORS = ("\n", "a", "1", ";")

Offsets = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A segment's tokens, with the characters each of them covers."""

    ids: list[int]
    offsets: Offsets
    """Characters of the segment's text, start and end of each token."""
    cuts: list[int]
    """First token of each run: neighbouring pieces with the same part in the loss, as one piece."""


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
                encoded = Encoded([self.tokenizer.bos_id, *encoded.ids], [(0, 0), *encoded.offsets], [cut + 1 for cut in encoded.cuts])
            segments.append(EncodedSegment(runs, encoded, segment.parent, first))
            first += len(encoded.ids)
        result = EncodedExample(tuple(segments), row, self, example.labels)
        self._check_bos(result, where)
        return result

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
            return Encoded([], [], [])
        text = "".join(run.text for run in runs)
        whole = Encoded(*self._encode_text(text, is_continued=is_continued), cuts=[0])
        starts = [start for start, _ in whole.offsets]
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
            return self._encode_text(text[:place], is_continued=is_continued)[0] == whole.ids[:cut]
        return self.tokenizer.encode(text[whole.offsets[first][0] : place])[0] == whole.ids[first:cut]

    def _is_clean_end(self, whole: Encoded, place: int, cut: int) -> bool:
        """Whether no token covers the end of an answer and what follows, but for an end-of-turn token that swallows a line break."""
        return not _reaches_over(whole, place, cut) or whole.ids[cut - 1] in self._stripping

    def continuation(self, text: str) -> list[int]:
        """The tokens of a text that follows another, without a space in front that is not there."""
        return self._encode_text(text, is_continued=True)[0]

    def _encode_text(self, text: str, *, is_continued: bool) -> tuple[list[int], Offsets]:
        """Tokens and offsets of a text, without a space in front that is not there where it continues another."""
        if not is_continued or not text or not self.adds_space:
            return self.tokenizer.encode(text)
        for anchor in ANCHORS:
            ids, offsets = self.tokenizer.encode(anchor + text)
            cut = bisect_left([start for start, _ in offsets], len(anchor))
            if cut == 0 or offsets[cut - 1][1] <= len(anchor):
                return ids[cut:], [(start - len(anchor), end - len(anchor)) for start, end in offsets[cut:]]
        return self.tokenizer.encode(text)


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
        before.offsets + [(start + place, end + place) for start, end in after.offsets],
        before.cuts + [cut + num_before for cut in after.cuts],
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
                    total += len(run.text.encode("utf-8", "surrogatepass"))
                    total -= sum(special[token_id] for token_id in segment.encoded.ids[start:end] if token_id in special)
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
                    reached = [min(max(stop - place, 0), len(text)) for _, stop in segment.encoded.offsets[start:end]]
                    reached[-1] = len(text)
                    bytes_before = np.concatenate([[0], np.cumsum(_utf8_lengths(text))])
                    covered = bytes_before[list(accumulate(reached, max))]
                    special = [self.tokeniser._special_bytes.get(token_id, 0) for token_id in segment.encoded.ids[start:end]]
                    result[segment.first + start : segment.first + end] = np.diff(covered, prepend=0) - special
                place += len(text)
        return result

    def tree(self) -> TokenTree:
        """The whole example as one tree."""
        spans: list[tuple[int, int, float, bool]] = []
        for segment in self.segments:
            for run, start, end in segment.run_bounds():
                if run.weight > 0 and end > start:
                    spans.append((segment.first + start, segment.first + end, run.weight, run.is_prompt))
        return TokenTree(
            tokens=np.array([token_id for segment in self.segments for token_id in segment.encoded.ids], dtype=np.int32),
            starts=np.array([segment.first for segment in self.segments], dtype=np.int32),
            parents=np.array([segment.parent for segment in self.segments], dtype=np.int32),
            spans=np.array(spans, dtype=SPAN),
            num_bytes=self.num_bytes(),
            row=self.row,
            labels=self.labels,
        )


def _utf8_lengths(text: str) -> NDArray[np.int64]:
    """(characters,) UTF-8 bytes of each character."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)


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
