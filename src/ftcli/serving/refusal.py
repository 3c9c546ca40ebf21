"""Why a request is not served, in the form that OpenAI's clients read, and what no JSON that comes in may hold."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 32  # objects and lists in each other; a request needs 7, and templates write arguments by recursion
_SHOWN = 200  # characters of a name that are repeated in an answer


class ApiError(Exception):
    """A request that is not served: HTTP status, and what is wrong."""

    def __init__(self, status: int, message: str, *, code: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.field = field

    def to_json(self) -> dict[str, Any]:
        """The body of the answer, as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}


def wrong(field: str, what: str) -> ApiError:
    """The refusal of a field, by its name."""
    shown = field.encode("utf-8", "backslashreplace").decode("utf-8")
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return ApiError(400, f"`{shown}` {what}", code="invalid_field", field=shown)


def check_values(content: dict[str, Any], where: str = "") -> None:
    """Refuse texts that are no Unicode, and what is nested so deep that code which goes down into it would fail.

    JSON can write half of a surrogate pair, which stands for no character: no tokenizer takes it, and UTF-8 cannot answer with it.

    Args:
        where: the name of the field that `content` is the value of.

    Raises:
        ApiError: 400, with the field.
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((where,) if where else (), content)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str) and not is_unicode(value):
            raise wrong(".".join(path), "holds half of a surrogate pair, which is no character")
        if not isinstance(value, dict | list):
            continue
        if len(path) > MAX_DEPTH:
            raise wrong(path[0], f"is nested deeper than {MAX_DEPTH}")
        if isinstance(value, dict):
            for name in value:
                if not is_unicode(name):
                    raise wrong(".".join((*path, name)), "has half of a surrogate pair in its name, which is no character")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        waiting += [((*path, str(name)), item) for name, item in items if isinstance(item, str | dict | list)]


def is_unicode(text: str) -> bool:
    """Can UTF-8 write it?"""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
