"""Which language, or at least which script, a text is written in."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable

from ftcli.errors import MissingExtraError

LOOK_CHARS = 1000
"""Of a text that decide."""
NO_LETTERS = "no letters"
# Unicode names Chinese characters by where they came from, and letters of other Latin-like sets by how they look.
_RENAMED = {"CJK": "Han", "FULLWIDTH": "Latin", "HALFWIDTH": "Katakana", "MODIFIER": "", "MATHEMATICAL": ""}


def script_of(text: str) -> str:
    """The script of most of its letters, by their Unicode names.

    Example:
        >>> script_of("a cat"), script_of("\\u043a\\u043e\\u0442 cat\\u0430\\u0430\\u0430"), script_of("1 + 1")
        ('Latin', 'Cyrillic', 'no letters')
    """
    counts = Counter(script for char in text[:LOOK_CHARS] if (script := _script_of_letter(char)))
    return counts.most_common(1)[0][0] if counts else NO_LETTERS


@functools.lru_cache(maxsize=1 << 16)
def _script_of_letter(char: str) -> str:
    """Empty for what is no letter, or a letter of no script."""
    if not char.isalpha():
        return ""
    first = unicodedata.name(char, "").partition(" ")[0]
    return _RENAMED.get(first, first.capitalize())


def language_finder() -> Callable[[str], str]:
    """Text -> ISO 639-1 code of its language, by a classifier over byte n-grams.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from py3langid import classify
    except ImportError as error:
        raise MissingExtraError("telling languages apart", "langid") from error

    def language_of(text: str) -> str:
        return str(classify(text[:LOOK_CHARS])[0]) if any(map(str.isalpha, text[:LOOK_CHARS])) else NO_LETTERS

    return language_of
