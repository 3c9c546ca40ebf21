"""What a recipe may say under `model.add_tokens`: words that become one token each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ftcli.errors import Problem, RequestError
from ftcli.spec import LocalPath, Spec

# Scripts that put no spaces between words, as a part of a regular expression: Thai and Lao, Burmese, Khmer, kana, Han.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_BEGINS_UNSPACED = re.compile(f"[{UNSPACED}]")


class AddTokens(Spec):
    """New tokens for words that the base's tokenizer cuts into many pieces, with rows of their own in embedding and head.

    A term of a domain that is one token costs one step to read and to write, and gets a meaning of its own. The base's own tokens
    keep their rows, and their logits do not change before training. Worth it where the text is long and the words frequent:
    `mine` says how many tokens they save. An adapter carries its new rows with it.

    Source: rows from the mean of the pieces' rows: Gee et al. 2022 (fast vocabulary transfer), arXiv:2402.09977, section 3; from
    the mean of all rows, which bounds what new tokens take from old ones: Hewitt 2021, "Initializing new word embeddings for
    pretrained language models".
    """

    tokens: tuple[str, ...] = ()
    """The new tokens, as they stand in the text."""
    file: LocalPath | None = None
    """A text file with one new token a line; spaces count. Such a file is in the folder of every run with new tokens."""
    mine: int | None = Field(default=None, ge=1)
    """Find so many words in the training texts, those that save the most tokens: `ftcli check` prints them, the run keeps them.
    Counted is what stands behind a space, not what begins a line; of scripts without spaces, strings of two to six characters."""
    leading_space: bool = True
    """Put a space in front of those that begin with a letter or digit, as words stand in a text, but for scripts without spaces;
    without, the space before a word stays a token of its own."""
    descriptions: dict[str, str] = {}
    """For some of the tokens a text that says what they mean: they start at the mean of its tokens."""
    start: Literal["pieces", "mean"] = "pieces"
    """Where the others start: at the mean of the pieces they were cut into, or of all tokens."""
    train: Literal["rows", "all", "none"] = "rows"
    """What trains beside what the method trains: the new rows, all rows of embedding and head, or neither."""

    @model_validator(mode="after")
    def _check_one_way(self) -> Self:
        given = [name for name in ("tokens", "file", "mine") if getattr(self, name) not in (None, ())]
        if len(given) != 1:
            found = " and ".join(f"`{name}`" for name in given) or "none"
            raise ValueError(f"found {found}, allowed: one of `tokens`, `file`, `mine`")
        empty = [token for token in self.tokens if not token.strip()]
        if empty or len(set(self.texts(self.tokens))) != len(self.tokens):
            raise ValueError("a token is empty or given twice")
        if silent := [token for token, text in self.descriptions.items() if not text.strip()]:
            raise ValueError(f"`descriptions` says nothing of `{silent[0]}`; left out, it starts as `start` says")
        if broken := [token for token in self.tokens if "\n" in token or "\r" in token]:
            raise ValueError(f"{broken[0]!r} has a line break: a list of tokens has one a line")
        if self.tokens and (unknown := self.described_in_vain(self.texts(self.tokens))):
            raise ValueError(f"`descriptions` has `{unknown[0]}`, which is not among the tokens")
        return self

    @property
    def is_settled(self) -> bool:
        """The tokens are named here, and nowhere else."""
        return bool(self.tokens)

    def settled(self, texts: Sequence[str]) -> AddTokens:
        """The same with these tokens in place of the way to find them."""
        return self.model_copy(update={"tokens": tuple(texts), "file": None, "mine": None})

    def known(self) -> tuple[str, ...]:
        """The tokens as they stand in texts; none while they are yet to be mined.

        Raises:
            RequestError: the file cannot be read, or names none.
        """
        if self.file is None:
            return self.texts(self.tokens)
        try:
            # Some editors put a byte order mark in front, which is no part of the first token.
            lines = Path(self.file).read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise _unreadable(self.file, (error.strerror or str(error)).lower()) from error
        except UnicodeDecodeError as error:
            raise _unreadable(self.file, f"is not UTF-8 at byte {error.start}") from error
        found = self.texts([line.removesuffix("\r") for line in lines if line.strip()])
        if not found:
            raise _unreadable(self.file, "names no tokens")
        if unknown := self.described_in_vain(found):
            raise _unreadable(self.file, f"does not have `{unknown[0]}`, which `descriptions` has")
        return found

    def described_in_vain(self, texts: Sequence[str]) -> list[str]:
        """The keys of `descriptions` that are none of the tokens `texts`."""
        return [token for token in self.descriptions if self.text(token) not in texts]

    def texts(self, tokens: Sequence[str]) -> tuple[str, ...]:
        """Tokens as they stand in texts, each once."""
        return tuple(dict.fromkeys(map(self.text, tokens)))

    def text(self, token: str) -> str:
        """
        Example:
            >>> [AddTokens(mine=1).text(token) for token in ("sepsis", " sepsis", "<icd>")]
            [' sepsis', ' sepsis', '<icd>']
        """
        return f" {token}" if self.leading_space and token[:1].isalnum() and not _BEGINS_UNSPACED.match(token) else token


def _unreadable(path: str, what: str) -> RequestError:
    return RequestError("the new tokens cannot be had", [Problem("model.add_tokens.file", f"`{path}`: {what}", "one token a line")])
