"""Passages of documents in front of a question: what a model may look up instead of knowing it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from ftcli.data.leakage import read_text
from ftcli.data.sources import Source
from ftcli.evaluation.tasks.columns import checked_template, fill
from ftcli.evaluation.tasks.retrieve_index import FORMAT, Passage, Passages, index_passages
from ftcli.spec import Spec

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer

_LAST_WORD = re.compile(r"\s*\S+\s*$")


def _with_both(template: str) -> str:
    """`template`, if it says where passages and question go."""
    checked_template(template)
    for name in ("{passages}", "{question}"):
        if name not in template:
            raise ValueError(f"`{name}` is missing: it says where they go")
    return template


class Retrieve(Spec):
    """The passages that share most with a question (BM25), put in front of it; the index is kept in the cache folder."""

    source: Source
    """The documents: a folder of text files, a jsonl, or any other source; each row is one."""
    text: Annotated[str, AfterValidator(checked_template)] | None = None
    """How a row becomes a document, with columns in braces; the default is all of its texts, each on a line."""
    count: int = Field(default=3, ge=1)
    """Passages in a prompt."""
    passage_words: int = Field(default=100, ge=1)
    """Longer documents are cut into passages of so many words."""
    overlap_words: int = Field(default=20, ge=0)
    """Words that a passage has in common with the one before, so that no sentence is cut in all of them."""
    budget_tokens: int = Field(default=512, ge=1)
    """Tokens that all passages of a prompt may have; the last is cut. Less where the model's context has no room for so many."""
    prompt: Annotated[str, AfterValidator(_with_both)] = "{passages}\n\n{question}"
    """What the model is asked, the best passage last."""
    separator: str = "\n\n"
    """What stands between passages."""

    def open(self, cache: Path | None) -> Passages:
        """The passages with their index, which is made once for the same documents and settings.

        Args:
            cache: folder of kept indices; None keeps none.

        Raises:
            DataError: a document cannot be read.
        """
        cut = min(self.overlap_words, self.passage_words - 1)
        return index_passages(self.documents(), self.passage_words, cut, None if cache is None else cache / self.fingerprint())

    def fingerprint(self) -> str:
        """Hash of the documents' bytes and of how they are cut."""
        settings = f"{FORMAT}\n{self.text!r}\n{self.passage_words}\n{self.overlap_words}\n{self.source.fingerprint()}"
        return hashlib.sha256(settings.encode()).hexdigest()[:32]

    def question(self, question: str, passages: Sequence[Passage], tokenizer: Tokenizer, fits: Callable[[str], bool]) -> str:
        """`question` with as many of the passages as budget and context hold; itself alone where nothing fits.

        Args:
            passages: the best first.
            fits: whether a question leaves room in the model's context.
        """
        texts, room = [], self.budget_tokens
        for passage in passages:
            text = shortened(passage.text, max(0, room), tokenizer)
            room -= num_tokens(text + self.separator, tokenizer)
            texts += [text] if text else []
            if text != passage.text:
                break
        while texts:
            asked = self._filled(question, texts)
            if fits(asked):
                return asked
            half = shortened(texts[-1], num_tokens(texts[-1], tokenizer) // 2, tokenizer)
            texts[-1:] = [half] if half else []
        return question

    def _filled(self, question: str, texts: Sequence[str]) -> str:
        passages = self.separator.join(reversed(texts))
        # Not by one `replace` after the other: a passage may hold `{question}` itself.
        parts = re.split(r"(\{passages\}|\{question\})", self.prompt)
        return "".join({"{passages}": passages, "{question}": question}.get(part, part) for part in parts)

    def documents(self) -> Iterator[Passage]:
        """Every document whole, in the order of the rows.

        Raises:
            DataError: one cannot be read.
        """
        for where, row in self.source.rows():
            yield Passage(where, self._text_of(row, where))

    def _text_of(self, row: dict[str, Any], where: str) -> str:
        if self.text is not None:
            return fill(self.text, row, where)
        both = read_text(row, where)
        return f"{both.question}\n{both.answer}" if both.answer else both.question


def num_tokens(text: str, tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(text)[0]) if text else 0


def shortened(text: str, room: int, tokenizer: Tokenizer) -> str:
    """The beginning of `text`, in whole words, that has at most `room` tokens."""
    while text and (size := num_tokens(text, tokenizer)) > room:
        # Cut by share first, so that few rounds are needed, then word by word.
        longest = max(0, min(len(text) - 1, int(len(text) * (room + 1) / size)))
        text = _LAST_WORD.sub("", text[: longest + 1]) if longest else ""
    return text
