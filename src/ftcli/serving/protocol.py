"""OpenAI's requests for answers, read strictly: what is asked is done, or refused with the field that is wrong."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ftcli.serving.messages import read_messages
from ftcli.serving.refusal import ApiError, check_values, wrong

DEFAULT_TOKENS = 256
MAX_STOPS, MAX_TOP_TEMPERATURE = 4, 2.0
_MOST_SEED = 2**63 - 1
_IGNORED: Mapping[str, type] = {"user": str, "metadata": dict, "store": bool, "safety_identifier": str, "prompt_cache_key": str}
"""Fields that change nothing in an answer, and their types."""
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logprobs": (False, None),
    "echo": (False, None),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": ("none", None),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": ("none", None),
    "logit_bias": (None, {}),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "service_tier": ("auto", "default", None),
    "top_logprobs": (None,),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields of which only these values can be served."""
_LENGTHS = ("max_completion_tokens", "max_tokens")
_READ = frozenset({"model", "messages", "prompt", *_LENGTHS})
_SAMPLING = frozenset({"temperature", "top_p", "seed", "stop", "stream", "stream_options"})
_STREAM_OPTIONS = frozenset({"include_usage", "include_obfuscation"})


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """What is to be answered."""

    model: str
    messages: tuple[dict[str, Any], ...] | None
    """A conversation; None for a text that is continued."""
    prompt: str
    max_tokens: int
    temperature: float
    top_p: float | None
    seed: int
    """Another one for each request that names none."""
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
        fields = json.loads(body, parse_constant=_no_number, object_pairs_hook=_told_once)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    check_values(fields)
    _refuse_unknown(fields, is_chat)
    model = fields.get("model")
    if not isinstance(model, str):
        raise wrong("model", "is not a text")
    top_p = fields.get("top_p")
    return AnswerRequest(
        model=model,
        messages=read_messages(fields.get("messages")) if is_chat else None,
        prompt="" if is_chat else _prompt(fields.get("prompt")),
        max_tokens=_max_tokens(fields, token_limit),
        temperature=float(_number(_or(fields.get("temperature"), 0), "temperature", 0, MAX_TOP_TEMPERATURE)),
        top_p=None if top_p is None else float(_number(top_p, "top_p", 0, 1)),
        seed=int(_number(_or(fields.get("seed"), secrets.randbelow(_MOST_SEED)), "seed", -_MOST_SEED - 1, _MOST_SEED, whole=True)),
        stop=_stops(fields.get("stop")),
        stream=_flag(fields.get("stream"), "stream"),
        with_usage=_with_usage(fields.get("stream_options")),
    )


def _told_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that comes twice it is anybody's guess which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise wrong(next(name for name in names if names.count(name) > 1), "is given twice")
    return found


def _no_number(name: str) -> NoReturn:
    """NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(name)


def _refuse_unknown(fields: dict[str, Any], is_chat: bool) -> None:
    for name, value in fields.items():
        if name in _ONLY:
            if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in _ONLY[name]):
                raise wrong(name, f"can only be {json.dumps(_ONLY[name][0])} here")
        elif name in _IGNORED:
            if value is not None and not isinstance(value, _IGNORED[name]):
                raise wrong(name, "is not of the type that it has to be")
        elif name not in _READ | _SAMPLING or name == ("prompt" if is_chat else "messages"):
            raise wrong(name, "is not a field that is served here")


def _max_tokens(fields: dict[str, Any], limit: int) -> int:
    """The longest answer, under either of its names."""
    given = {int(_number(fields[name], name, 1, limit, whole=True)) for name in _LENGTHS if fields.get(name) is not None}
    if len(given) > 1:
        raise wrong("max_tokens", "is another number than `max_completion_tokens`")
    return given.pop() if given else min(DEFAULT_TOKENS, limit)


def _prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise wrong("prompt", "is not one text")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(isinstance(text, str) and text for text in texts):
        raise wrong("stop", f"is not a text, or a list of up to {MAX_STOPS}")
    return tuple(texts)


def _with_usage(options: Any) -> bool:
    if options is not None and not isinstance(options, dict):
        raise wrong("stream_options", "is not an object")
    flags = {name: _flag(value, f"stream_options.{name}") for name, value in (options or {}).items() if name in _STREAM_OPTIONS}
    for name in options or {}:
        if name not in flags:
            raise wrong(f"stream_options.{name}", "is not a field that is served here")
    return flags.get("include_usage", False)


def _flag(value: Any, field: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise wrong(field, "is not true or false")
    return bool(value)


def _number(value: Any, field: str, least: float, most: float, *, whole: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and (not whole or isinstance(value, int))
    if not is_number or not least <= value <= most:
        raise wrong(field, f"is not a {'whole ' if whole else ''}number from {least:g} to {most:g}")
    return value  # type: ignore[no-any-return]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
