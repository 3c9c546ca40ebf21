"""Texts that the base model itself writes before training: replay where none of the text it was trained on is at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from ftcli.errors import DataError, Problem
from ftcli.spec import Spec


class OwnText(Spec):
    """Samples of the base model, written once and kept in the cache; `ftcli train` and `ftcli check` write them.

    They hold what the model would say, so training on them holds it where it is. They cost one forward pass per token, and are worth
    as much as the model: text of the original training data, where it can be had, is better.

    Source: data-free rehearsal as in Sun et al. 2020, LAMOL, arXiv:1909.03329, section 3, with the base model as its own generator.
    """

    kind: Literal["self"] = "self"
    tokens: int = Field(default=100_000, ge=1)
    """Tokens to sample in all; a larger value takes longer before training begins."""
    max_length: int = Field(default=256, ge=2)
    """Longest sample in tokens; one that is cut here has no EOS and is learnt without."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; 1 draws from the model's own distribution, a smaller value from what it holds likeliest."""
    beginnings: tuple[str, ...] = ()
    """Texts that samples begin with, in turn. Without any they begin behind the token that begins a text, or ends the one before."""
    seed: int = Field(default=17, ge=0)
    """Of sampling."""

    def label(self) -> str:
        return "self"

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """There are none before a model has written them.

        Raises:
            DataError: always; whoever has the model puts its samples in place of this source.
        """
        raise DataError("a source cannot be read", [Problem("self", "its rows are written by the base model of a training recipe")])

    def fingerprint(self) -> str:
        """Hash of the settings; which model writes is for the one who has it to add."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
