"""OpenAI's requests for answers, read strictly: what is asked is done, or refused with the field that is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_TOKENS = 256
MAX_STOPS, MAX_TOP_TEMPERATURE = 4, 2.0
_IGNORED = frozenset({"user", "metadata", "store"})
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logprobs": (False, None),
    "echo": (False, None),
    "suffix": (None,),
    "tools": (None, []),
    "tool_choice": ("none", None),
    "logit_bias": (None, {}),
    "response_format": ({"type": "text"}, None),
    "top_logprobs": (None,),
}
"""Fields of which only these values can be served."""
_READ = frozenset({"model", "messages", "prompt", "max_tokens", "max_completion_tokens"})
_SAMPLING = frozenset({"temperature", "top_p", "seed", "stop", "stream", "stream_options"})


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


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """What is to be answered."""

    model: str
    messages: tuple[dict[str, str], ...] | None
    """A conversation; None for a text that is continued."""
    prompt: str
    max_tokens: int
    temperature: float
    top_p: float | None
    seed: int
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool
    """The stream ends with a count of its tokens."""

    @property
    def is_chat(self) -> bool:
        return self.messages is not None


def read_request(body: bytes, *, is_chat: bool, token_limit: int) -> AnswerRequest:
    """The request in an HTTP body.

    Raises:
        ApiError: 400, with the field that is wrong.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    _refuse_unknown(fields, is_chat)
    asked = _or(fields.get("max_completion_tokens"), _or(fields.get("max_tokens"), min(DEFAULT_TOKENS, token_limit)))
    max_tokens = _number(asked, "max_tokens", 1, token_limit, whole=True)
    model = fields.get("model")
    if not isinstance(model, str):
        raise _wrong("model", "is not a text")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _wrong("stream_options", "is not an object")
    top_p = fields.get("top_p")
    return AnswerRequest(
        model=model,
        messages=_messages(fields.get("messages")) if is_chat else None,
        prompt="" if is_chat else _prompt(fields.get("prompt")),
        max_tokens=int(max_tokens),
        temperature=_number(_or(fields.get("temperature"), 0.0), "temperature", 0, MAX_TOP_TEMPERATURE),
        top_p=None if top_p is None else _number(top_p, "top_p", 1e-6, 1),
        seed=int(_number(_or(fields.get("seed"), 0), "seed", 0, 2**63 - 1, whole=True)),
        stop=_stops(fields.get("stop")),
        stream=_flag(fields.get("stream"), "stream"),
        with_usage=_flag(options.get("include_usage"), "stream_options.include_usage"),
    )


def _refuse_unknown(fields: dict[str, Any], is_chat: bool) -> None:
    for name, value in fields.items():
        if name in _ONLY:
            if value not in _ONLY[name]:
                raise _wrong(name, f"can only be {_ONLY[name][0]!r} here")
        elif name not in _READ | _SAMPLING | _IGNORED or name == ("prompt" if is_chat else "messages"):
            raise _wrong(name, "is not a field that is served here")


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "is not a list of messages")
    found = []
    for index, message in enumerate(value):
        where = f"messages.{index}"
        if not isinstance(message, dict):
            raise _wrong(where, "is not an object")
        role, content = message.get("role"), _content(message.get("content"), where)
        if role not in ("system", "developer", "user", "assistant"):
            raise _wrong(f"{where}.role", "is none of system, user, assistant")
        found.append({"role": "system" if role == "developer" else role, "content": content})
    return tuple(found)


def _content(value: Any, where: str) -> str:
    """Text, or parts of text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise _wrong(f"{where}.content", "is not a text")


def _prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise _wrong("prompt", "is not one text")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(isinstance(text, str) and text for text in texts):
        raise _wrong("stop", f"is not a text, or a list of up to {MAX_STOPS}")
    return tuple(texts)


def _flag(value: Any, field: str) -> bool:
    if value not in (None, True, False):
        raise _wrong(field, "is not true or false")
    return bool(value)


def _number(value: Any, field: str, least: float, most: float, *, whole: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and (not whole or isinstance(value, int))
    if not is_number or not least <= value <= most:
        raise _wrong(field, f"is not a {'whole ' if whole else ''}number from {least:g} to {most:g}")
    return value  # type: ignore[no-any-return]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _wrong(field: str, what: str) -> ApiError:
    return ApiError(400, f"`{field}` {what}", code="invalid_field", field=field)
