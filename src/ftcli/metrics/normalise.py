"""What is taken out of a text before it is compared."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Literal

Normaliser = Literal["case", "punctuation", "articles", "spaces"]

_ARTICLE = r"\b(?:a|an|the)\b"
_MARK = f"[{re.escape(string.punctuation)}]+"
# Several with nothing but whitespace between them are taken out at once, with the whitespace that follows.
_ARTICLES = re.compile(rf"{_ARTICLE}(?:\s+{_ARTICLE})*\s*", re.IGNORECASE)
_PUNCTUATION = re.compile(rf"{_MARK}(?:\s+{_MARK})*\s*")
SQUAD: tuple[Normaliser, ...] = ("case", "punctuation", "articles", "spaces")


def normalised(text: str, steps: Sequence[Normaliser]) -> str:
    """`text` without what `steps` name, always in the order case, punctuation, articles, spaces.

    What is taken out leaves one gap: "a , b" and "a b" are the same without punctuation, whether spaces count or not.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, whose evaluation does all four; English articles, ASCII punctuation.

    Example:
        >>> normalised("The  Cat, sat!", ("case", "punctuation", "articles", "spaces"))
        'cat sat'
        >>> normalised("saw the cat !", ("articles",)), normalised("saw the cat !", ("punctuation",))
        ('saw cat !', 'saw the cat')
    """
    text = text.lower() if "case" in steps else text
    text = _without(_PUNCTUATION, text, "") if "punctuation" in steps else text
    text = _without(_ARTICLES, text, " ") if "articles" in steps else text
    return " ".join(text.split()) if "spaces" in steps else text


def _without(pattern: re.Pattern[str], text: str, between: str) -> str:
    """`text` without what matches; the whitespace on its two sides becomes that of one.

    Args:
        between: what comes where there is none on either side.
    """

    def gap(match: re.Match[str]) -> str:
        start = match.start()
        if start == 0 or text[start - 1].isspace():
            return ""
        return (re.search(r"\s+", match[0]) or [between])[0]

    kept = pattern.sub(gap, text)
    # What stood at the end leaves its gap in front of nothing.
    return kept if text[-1:].isspace() else kept.rstrip()
