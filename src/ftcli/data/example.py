"""One item as its author wrote it, cut into runs of text that each have one part in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text with one part in the loss."""

    text: str
    weight: float
    """Weight of its tokens as targets; 0 is context only and never trained."""
    is_prompt: bool
    """The objective scales the weight with its `prompt_loss_weight`: user and system turns, prompts."""

    @property
    def is_trained(self) -> bool:
        """True for an answer that counts, whatever the objective."""
        return self.weight > 0 and not self.is_prompt


@dataclass(frozen=True, slots=True)
class ExampleSegment:
    """Pieces in a row, hanging on the end of a parent segment."""

    pieces: tuple[Piece, ...]
    parent: int
    """Index of the parent segment, -1 for the root; parents come first."""

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Example:
    """A tree of text: one segment for a chat or a text, a prompt with branches for a pair."""

    segments: tuple[ExampleSegment, ...]
    add_bos: bool
    """The encoder has to put a BOS token in front, because no template wrote one."""
    labels: tuple[str, ...] | None = None
    """What the row is said to be: names of classes, or one number as text; None where the row says nothing of the kind."""

    @property
    def num_trained(self) -> int:
        """Pieces that train whatever the objective's `prompt_loss_weight` is."""
        return sum(piece.is_trained for segment in self.segments for piece in segment.pieces)


def path_example(pieces: Sequence[Piece], *, add_bos: bool) -> Example:
    """An example of one path, without its empty pieces."""
    return Example(segments=(ExampleSegment(pieces=tuple(piece for piece in pieces if piece.text), parent=-1),), add_bos=add_bos)


def question_of(example: Example, end_texts: Sequence[str] = ()) -> tuple[str, str]:
    """The prompt to generate from and the reference answer: the last trained piece and everything before it.

    Args:
        example: of one path; of a tree, its first path is taken.
        end_texts: end-of-turn texts (`Tokenizer.end_texts`) to take off the answer.

    Returns:
        (prompt, answer); both empty when nothing is trained.

    Example:
        >>> question_of(path_example([Piece("2+2=", 1.0, True), Piece("4</s>", 1.0, False)], add_bos=True), ["</s>"])
        ('2+2=', '4')
    """
    pieces: list[Piece] = []
    last = -1
    for index, segment in enumerate(example.segments):
        if segment.parent == last:
            pieces += segment.pieces
            last = index
    trained = [index for index, piece in enumerate(pieces) if piece.is_trained]
    if not trained:
        return "", ""
    answer = pieces[trained[-1]].text
    for end in end_texts:
        if end and answer.endswith(end):
            answer = answer[: -len(end)]
            break
    return "".join(piece.text for piece in pieces[: trained[-1]]), answer
