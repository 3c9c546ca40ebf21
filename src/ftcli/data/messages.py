"""One conversation as chat templates expect it, from the ways in which data sets write it.

Read: OpenAI messages (`role`, `content`, `tool_calls`, `tool_call_id`) and ShareGPT turns (`from`, `value`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftcli.errors import DataError, Problem, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
# What data sets call the roles; ShareGPT and its descendants on the left.
_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "claude": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "tool_results": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")
_OWN_KEYS = {"role", "from", "content", "value", "train", "weight", "tool_calls", "function_call"}


@dataclass(frozen=True, slots=True)
class Message:
    """A message for the template, and how much its tokens count as targets."""

    fields: Mapping[str, Any]
    """What the template sees: role, content, tool_calls, name, ..."""
    weight: float
    """Factor on the loss of its tokens; 0 is never trained."""

    @property
    def is_answer(self) -> bool:
        return bool(self.fields["role"] == "assistant")


def looks_like_messages(value: Any) -> bool:
    """True for a list whose first item is a message in one of the known ways of writing it."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], Mapping):
        return False
    keys: set[Any] = set(value[0])
    return any(needed <= keys for needed in ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"}))


def read_messages(value: Any, where: str, column: str) -> list[Message]:
    """The conversation in a column.

    Raises:
        DataError: it is none; names the turn, counted from 1.
    """
    if not isinstance(value, (list, tuple)):
        raise bad_row(where, f"column `{column}` is {kind_of(value)}, not a list of messages")
    if not value:
        raise bad_row(where, f"column `{column}` has no messages")
    return [_read_message(message, where, f"{column}.{number}") for number, message in enumerate(value, start=1)]


def read_tools(value: Any, where: str, column: str) -> list[dict[str, Any]] | None:
    """The tools a row offers, as a list of JSON descriptions; None where it offers none."""
    if isinstance(value, str):
        value = _parse_json(value, where, column) if value.strip() else None
    if value is None or value == [] or value == {}:
        return None
    tools = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise bad_row(where, f"column `{column}` is not a list of tool descriptions")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def read_weight(value: Any, where: str, what: str) -> float:
    """A weight of a row or turn; 1 where there is none."""
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise bad_row(where, f"{what} is `{value}`, not a number from 0 up")
    return weight


def read_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column."""
    value = column_of(row, column, where)
    if not isinstance(value, str):
        raise bad_row(where, f"column `{column}` is {kind_of(value)}, not a text")
    return value


def column_of(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value in a column that has to be there."""
    if column not in row:
        hint = did_you_mean(column, list(map(str, row)))
        raise bad_row(where, f"column `{column}` is not there (columns: {', '.join(map(str, row)) or 'none'})", hint)
    return row[column]


def bad_row(where: str, what: str, hint: str | None = None) -> DataError:
    return DataError("a row cannot be used", [Problem(where, what, hint)])


def kind_of(value: Any) -> str:
    """What a value is, in words of JSON."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _read_message(message: Any, where: str, turn: str) -> Message:
    if not isinstance(message, Mapping):
        raise bad_row(where, f"{turn} is {kind_of(message)}, not a message with `role` and `content`")
    given, role = _read_role(message, where, turn)
    content = _read_content(message, where, turn)
    fields: dict[str, Any] = {"role": role, "content": content}
    calls = _read_calls(message, where, turn)
    if given in _CALL_ROLES and not calls and content is not None:
        calls, fields["content"] = _calls_in_text(content, where, turn), ""
    if calls:
        fields["tool_calls"] = calls
    fields |= {key: value for key, value in message.items() if key not in _OWN_KEYS and value is not None}
    weight = _read_turn_weight(message, role, where, turn)
    if fields["content"] is None:
        if not calls:
            raise bad_row(where, f"{turn} has no content")
        fields["content"] = ""
    if role == "assistant" and weight > 0 and not calls and not fields["content"].strip():
        raise bad_row(where, f"{turn} is an empty answer", "leave the row out, or set `train: false` on the turn")
    return Message(fields=fields, weight=weight)


def _read_role(message: Mapping[str, Any], where: str, turn: str) -> tuple[str, str]:
    """The role as written, and as templates know it."""
    given = message.get("role", message.get("from"))
    if not isinstance(given, str):
        keys = ", ".join(map(str, message)) or "none"
        raise bad_row(where, f"{turn} has no role (keys: {keys})", "a message has `role` and `content`, or `from` and `value`")
    written = given.strip().lower()
    role = _ALIASES.get(written, written)
    if role not in ROLES:
        allowed = [*ROLES, *_ALIASES]
        hint = did_you_mean(written, allowed) or f"allowed are {', '.join(allowed)}"
        raise bad_row(where, f"{turn} has the unknown role `{given}`", hint)
    return written, role


def _read_content(message: Mapping[str, Any], where: str, turn: str) -> str | None:
    content = message.get("content", message.get("value"))
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        return "".join(_part_text(part, where, turn) for part in content)
    raise bad_row(where, f"{turn} has {kind_of(content)} as content, not a text")


def _part_text(part: Any, where: str, turn: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else kind_of(part)
    if kind != "text" or not isinstance(part.get("text"), str):
        raise bad_row(where, f"{turn} has a part of type `{kind}`", "only parts of type `text` can be trained on")
    return str(part["text"])


def _read_calls(message: Mapping[str, Any], where: str, turn: str) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if calls is None and isinstance(message.get("function_call"), Mapping):
        calls = [{"type": "function", "function": message["function_call"]}]
    if not calls:
        return []
    if not isinstance(calls, (list, tuple)):
        raise bad_row(where, f"{turn}.tool_calls is {kind_of(calls)}, not a list")
    return [_read_call(call, where, f"{turn}.tool_calls.{number}") for number, call in enumerate(calls, start=1)]


def _read_call(call: Any, where: str, name: str) -> dict[str, Any]:
    """The call with its arguments as an object, which templates write as JSON; as a text they would be quoted twice."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise bad_row(where, f"{name} has no function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse_json(arguments, where, f"{name}.arguments") if arguments.strip() else {}
    plain = dict(function) | {"arguments": arguments}
    return {**({} if function is call else call), "type": "function", "function": plain}


def _calls_in_text(text: str, where: str, turn: str) -> list[dict[str, Any]]:
    """The calls that a ShareGPT `function_call` turn holds as JSON: one object, or a list of them."""
    parsed = _parse_json(text, where, turn)
    return [_read_call(call, where, turn) for call in (parsed if isinstance(parsed, list) else [parsed])]


def _parse_json(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_row(where, f"{what} is not valid JSON: {error}") from error


def _read_turn_weight(message: Mapping[str, Any], role: str, where: str, turn: str) -> float:
    train = message.get("train")
    if train is not None and not isinstance(train, bool):
        raise bad_row(where, f"{turn}.train is `{train}`, neither true nor false")
    weight = read_weight(message.get("weight"), where, f"{turn}.weight")
    if role != "assistant":
        if train is True or (message.get("weight") is not None and weight not in (0.0, 1.0)):
            hint = "`objective.prompt_loss_weight` trains on prompts"
            raise bad_row(where, f"{turn} has the role `{role}`; only answers of the assistant can be marked for training", hint)
        return 1.0
    return 0.0 if train is False else weight


def fields_of(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """What the template sees of each message."""
    return [message.fields for message in messages]
