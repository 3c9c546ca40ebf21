"""What is taken out of a text before it is compared."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Literal

Normaliser = Literal["case", "punctuation", "articles", "spaces"]

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
SQUAD: tuple[Normaliser, ...] = ("case", "punctuation", "articles", "spaces")


def normalised(text: str, steps: Sequence[Normaliser]) -> str:
    """`text` without what `steps` name, always in the order case, punctuation, articles, spaces.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, whose evaluation does all four; English articles, ASCII punctuation.

    Example:
        >>> normalised("The  Cat, sat!", ("case", "punctuation", "articles", "spaces"))
        'cat sat'
    """
    text = text.lower() if "case" in steps else text
    text = text.translate(_PUNCTUATION) if "punctuation" in steps else text
    text = _ARTICLES.sub(" ", text) if "articles" in steps else text
    return " ".join(text.split()) if "spaces" in steps else text
