"""The messages of a conversation as OpenAI's clients send them: every key is honoured, or refused by its name.

What a chat template does with a key is its own affair, so it is asked: a key that changes nothing in the text it writes was not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ftcli.errors import FtcliError
from ftcli.serving.refusal import check_values, wrong

_KEYS: Mapping[str, frozenset[str]] = {
    "system": frozenset({"name"}),
    "user": frozenset({"name"}),
    "assistant": frozenset({"name", "tool_calls"}),
    "tool": frozenset({"name", "tool_call_id"}),
}
"""What a message of each role may have beside `role` and `content`."""
_EMPTY: Mapping[str, tuple[Any, ...]] = {"annotations": ([],), "refusal": (), "audio": (), "function_call": ()}
"""Keys that clients send back from an answer they got, and their values, beside null, that say nothing."""
_SEEN = ("content", "name", "tool_calls")
"""Keys whose text must stand in the prompt."""

Message = dict[str, Any]
Render = Callable[[Sequence[Mapping[str, Any]]], str]


def read_messages(value: Any) -> tuple[Message, ...]:
    """The messages as chat templates take them: content as one text, arguments of calls as objects.

    Raises:
        ApiError: 400, with the key that is wrong.
    """
    if not isinstance(value, list) or not value:
        raise wrong("messages", "is not a list of messages")
    messages = [_read_message(message, f"messages.{index}") for index, message in enumerate(value)]
    _check_results(messages)
    return tuple(messages)


def check_all_is_read(messages: Sequence[Message], text: str, render: Render) -> None:
    """Refuse a conversation of which the chat template leaves something out.

    Args:
        text: what `render` makes of the messages.

    Raises:
        ApiError: 400, with the first key that no message of its role would be missed for.
    """
    for role in dict.fromkeys(message["role"] for message in messages):
        for key in _SEEN:
            holders = [index for index, message in enumerate(messages) if message["role"] == role and _says(message.get(key))]
            if holders and _without(messages, holders, key, render) == text:
                raise wrong(f"messages.{holders[0]}.{key}", f"is left out by the model's chat template, in messages of `{role}`")
    results = [index for index, message in enumerate(messages) if "tool_call_id" in message]
    misplaced = _first_out_of_order(messages)
    if misplaced is not None and _without(messages, results, "tool_call_id", render) == text:
        what = "is out of order, and the model's chat template tells results by their order alone"
        raise wrong(f"messages.{misplaced}.tool_call_id", what)


def _without(messages: Sequence[Message], places: Collection[int], key: str, render: Render) -> str | None:
    """The text of the conversation without a key in some of its messages; None where the template misses it."""
    fewer = [
        {name: value for name, value in message.items() if name != key} if index in places else message
        for index, message in enumerate(messages)
    ]
    try:
        return render(fewer)
    except FtcliError:
        return None


def _says(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise wrong(where, "is not an object")
    given = message.get("role")
    role = "system" if given == "developer" else given
    if not isinstance(role, str) or role not in _KEYS:
        raise wrong(f"{where}.role", "is none of system, developer, user, assistant, tool")
    allowed = _KEYS[role]
    for key, value in message.items():
        if key not in allowed | {"role", "content"} and value is not None and value not in _EMPTY.get(key, ()):
            raise wrong(f"{where}.{key}", f"is not served in a message of `{role}`")
    found: Message = {"role": role}
    if message.get("tool_calls") is not None:
        found["tool_calls"] = _read_calls(message["tool_calls"], f"{where}.tool_calls")
    has_no_text = message.get("content") is None and "tool_calls" in found
    found["content"] = "" if has_no_text else _read_content(message.get("content"), f"{where}.content")
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None:
            found[key] = _text(message[key], f"{where}.{key}")
    return found


def _read_content(value: Any, where: str) -> str:
    """Text, or parts of text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong(where, "is neither a text nor a list of parts")
    return "".join(_read_part(part, f"{where}.{index}") for index, part in enumerate(value))


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise wrong(where, "is not an object")
    if part.get("type") != "text":
        raise wrong(f"{where}.type", "is not `text`, the only type of part that is served")
    _only_keys(part, {"type", "text"}, where)
    text = part.get("text")
    if not isinstance(text, str):
        raise wrong(f"{where}.text", "is not a text")
    return text


def _read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise wrong(where, "is not a list of calls")
    calls = [_read_call(call, f"{where}.{index}") for index, call in enumerate(value)]
    if len({call["id"] for call in calls}) < len(calls):
        raise wrong(where, "has two calls with the same `id`")
    return calls


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """The call with its arguments as an object, as in training: as a text, templates would quote them twice."""
    if not isinstance(call, dict):
        raise wrong(where, "is not an object")
    _only_keys(call, {"id", "type", "function", "index"}, where)
    if call.get("type", "function") != "function":
        raise wrong(f"{where}.type", "is not `function`, the only type of call that is served")
    function = call.get("function")
    if not isinstance(function, dict):
        raise wrong(f"{where}.function", "is not an object")
    _only_keys(function, {"name", "arguments"}, f"{where}.function")
    arguments = _read_arguments(function.get("arguments"), f"{where}.function.arguments")
    plain = {"name": _text(function.get("name"), f"{where}.function.name"), "arguments": arguments}
    return {"id": _text(call.get("id"), f"{where}.id"), "type": "function", "function": plain}


def _read_arguments(value: Any, where: str) -> dict[str, Any]:
    """The object that is written in the text of the arguments."""
    if not isinstance(value, str):
        raise wrong(where, "is not a text")
    try:
        arguments = json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise wrong(where, "is not a JSON object")
    check_values(arguments, where)
    return arguments


def _check_results(messages: Sequence[Message]) -> None:
    """Every result of a tool belongs to a call of the assistant's message before it, and each has one result."""
    waiting: set[str] = set()
    for index, message in enumerate(messages):
        if message["role"] != "tool":
            waiting = {call["id"] for call in message.get("tool_calls", ())}
        elif message.get("tool_call_id") not in waiting:
            raise wrong(f"messages.{index}.tool_call_id", "names no call that waits for its result")
        else:
            waiting.remove(message["tool_call_id"])


def _first_out_of_order(messages: Sequence[Message]) -> int | None:
    """The first result of a tool that is not that of the next call."""
    waiting: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] != "tool":
            waiting = [call["id"] for call in message.get("tool_calls", ())]
        elif waiting.pop(0) != message["tool_call_id"]:
            return index
    return None


def _only_keys(value: Mapping[str, Any], keys: Collection[str], where: str) -> None:
    for key, item in value.items():
        if key not in keys and item is not None:
            raise wrong(f"{where}.{key}", "is not served here")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise wrong(where, "is not a text")
    return value
