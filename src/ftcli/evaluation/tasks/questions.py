"""What a row asks, by its content: so that a question is known again wherever it stands."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftcli.data.leakage import read_text
from ftcli.data.messages import looks_like_messages
from ftcli.errors import FtcliError

if TYPE_CHECKING:
    from ftcli.evaluation.tasks import Task
    from ftcli.models.tokenizer import Tokenizer

Rows = Sequence[tuple[str, dict[str, Any]]]
QUESTION_COLUMNS = ("question", "prompt", "instruction", "query")
MAX_LISTED = 5
# A hyphen between letters joins words; any other one is a sign.
_WORD_OR_SIGN = re.compile(r"\w+|(?<!\w)-|-(?=[\s\d])|[+*/=<>^%$€£~|&#@\\\u2212\u00d7\u00f7≤≥≠]")


def question_key(prompt: str) -> str:
    """By which equal questions are known: the words, as `ftcli data audit` compares them, and the signs that arithmetic turns on.

    Example:
        >>> question_key("Well-known:  What is 2 - 3?") == question_key("well known, what IS 2 - 3")
        True
        >>> question_key("2 - 3") == question_key("2 + 3")
        False
    """
    plain = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(_WORD_OR_SIGN.findall(plain)) or plain.strip()


def question_keys(task: Task, rows: Rows, tokenizer: Tokenizer) -> list[frozenset[str]]:
    """For each row the keys of what it asks: as the task asks it, where the task can read these rows, and as it stands in its column."""
    try:
        prompts = task.prompts(rows, tokenizer)
    except FtcliError:  # training rows may be in a form that the task does not read
        prompts = []
    asked = [frozenset([question_key(prompt)]) for prompt in prompts] or [frozenset()] * len(rows)
    return [keys | _plain_key(row) for keys, (_, row) in zip(asked, rows, strict=True)]


def _plain_key(row: dict[str, Any]) -> frozenset[str]:
    """The key of the question in its usual column: of a chat all turns before the answer."""
    for name in (*(one for one in row if looks_like_messages(row[one])), *QUESTION_COLUMNS):
        value = row.get(name)
        if value is not None:
            return frozenset([question_key(value if isinstance(value, str) else read_text({name: value}, "").question)])
    return frozenset()


def shared_rows(task: Task, rows: Rows, others: Rows, tokenizer: Tokenizer) -> dict[str, str]:
    """The rows whose question is asked in `others`, too: where each stands, and where the first of the others does."""
    first: dict[str, str] = {}
    for (where, _), keys in zip(others, question_keys(task, others, tokenizer), strict=True):
        for key in keys:
            first.setdefault(key, where)
    keyed = zip(rows, question_keys(task, rows, tokenizer), strict=True)
    found = {where: [first[key] for key in sorted(keys) if key in first] for (where, _), keys in keyed}
    return {where: places[0] for where, places in found.items() if places}


def listed_rows(rows: Sequence[str]) -> str:
    """The first of them.

    Example:
        >>> listed_rows(["a:1", "a:2"])
        'a:1, a:2'
    """
    return ", ".join(rows[:MAX_LISTED]) + (", ..." if len(rows) > MAX_LISTED else "")
