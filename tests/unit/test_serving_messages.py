"""Messages of a request: what the chat template can write is honoured, everything else is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from ftcli.models.jinja import render_template
from ftcli.models.templates import own_template
from ftcli.serving.messages import check_all_is_read, read_messages
from ftcli.serving.protocol import AnswerRequest, read_request
from ftcli.serving.refusal import MAX_DEPTH, ApiError

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NAMED = "{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.content }}\n{% endfor %}"
TOOLS = own_template("plain", adds_bos=False, has_chatml_tokens=False)
WITH_IDS = TOOLS.replace("message.role | capitalize", "(message.tool_call_id or message.role)")
USER = {"role": "user", "content": "Hi"}


def call(id: str = "1", **fields: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "price", "arguments": '{"of": "lamp"}'}, **fields}


def calling(*ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call(id) for id in ids]}


def result(id: str = "1", **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": f"result {id}", **fields}


def prompt(messages: Any, template: str = PLAIN) -> str:
    """The prompt that a server makes of the messages."""
    read = read_messages(messages)

    def render(given: Sequence[Mapping[str, Any]]) -> str:
        return render_template(template, given, eos_token="</s>")

    text = render(read)
    check_all_is_read(read, text, render)
    return text


def refused_field(messages: Any, template: str = PLAIN) -> str | None:
    with pytest.raises(ApiError) as error:
        prompt(messages, template)
    assert error.value.status == 400
    return error.value.field


def test_what_a_client_sends_back_of_an_answer_is_accepted() -> None:
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None, "name": None}
    messages = [USER, {"role": "assistant", "content": "Yes", **empty}, USER]
    assert prompt(messages) == "user: Hi\nassistant: Yes\nuser: Hi\n"


def test_parts_of_text_are_one_text_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompt([{"role": "developer", "content": parts}]) == "system: ab\n"


def test_a_name_is_honoured_where_the_template_writes_it_and_refused_where_it_does_not() -> None:
    messages = [USER, {**USER, "name": "Ada"}]
    assert "user Ada: Hi" in prompt(messages, NAMED)
    assert refused_field(messages, PLAIN) == "messages.1.name"


def test_calls_reach_the_template_as_in_training_or_are_refused() -> None:
    messages = [USER, calling("1"), result("1")]
    assert '"arguments": {"of": "lamp"}' in prompt(messages, TOOLS)
    assert "result 1" in prompt(messages, TOOLS)
    assert refused_field(messages, PLAIN) == "messages.1.tool_calls"


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    only_users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert refused_field([{"role": "system", "content": "Be brief"}, USER], only_users) == "messages.0.content"
    assert prompt([{"role": "system", "content": ""}, USER], only_users) == "Hi"


def test_results_in_another_order_need_a_template_that_writes_their_ids() -> None:
    messages = [USER, calling("1", "2"), result("2"), result("1")]
    assert refused_field(messages, TOOLS) == "messages.2.tool_call_id"
    assert prompt(messages, WITH_IDS).index("result 2") < prompt(messages, WITH_IDS).index("result 1")
    assert "result 2" in prompt([USER, calling("1", "2"), result("1"), result("2")], TOOLS)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({**USER, "zzz": 1}, "zzz"),
        ({**USER, "tool_calls": [call()]}, "tool_calls"),
        ({**USER, "annotations": [1]}, "annotations"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "refusal"),
        ({"role": "function", "content": "a"}, "role"),
        ({"role": ["user"], "content": "a"}, "role"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": ["a"]}, "content.0"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "text": "b"}]}, "content.1.type"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "x"}}]}, "content.0.image_url"),
        ({"role": "user", "content": [{"type": "text"}]}, "content.0.text"),
        ({**USER, "name": 5}, "name"),
        (result("1"), "tool_call_id"),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [{"x": 1}]}, "tool_calls.0.x"),
        ({"role": "assistant", "tool_calls": [call(type="custom")]}, "tool_calls.0.type"),
        ({"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": "[]"})]}, "tool_calls.0.function.arguments"),
        ({"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": '{"a": "\\ud800"}'})]}, None),
        ({"role": "assistant", "tool_calls": [call(), call()]}, "tool_calls"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(message: dict[str, Any], field: str | None) -> None:
    found = refused_field([message], TOOLS)
    assert found == (f"messages.0.{field}" if field is not None else "messages.0.tool_calls.0.function.arguments.a")


def test_a_result_needs_a_call_that_waits_for_it() -> None:
    assert refused_field([USER, calling("1"), result("1"), result("1")], TOOLS) == "messages.3.tool_call_id"
    assert refused_field([calling("1"), USER, result("1")], TOOLS) == "messages.2.tool_call_id"


def request(**fields: Any) -> AnswerRequest:
    body = json.dumps({"model": "m", "messages": [USER], **fields}).encode()
    return read_request(body, is_chat=True, token_limit=32)


def test_whole_numbers_are_numbers() -> None:
    read = request(temperature=2, top_p=1, max_tokens=4, seed=-5)
    assert (type(read.temperature), read.temperature, type(read.top_p), read.top_p, read.seed) == (float, 2.0, float, 1.0, -5)
    assert request(top_p=0).top_p == 0.0
    assert request(max_completion_tokens=7).max_tokens == 7


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": True}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": "1"}, "top_p"),
        ({"max_tokens": 4.0}, "max_tokens"),
        ({"max_completion_tokens": "a", "max_tokens": 4}, "max_completion_tokens"),
        ({"max_completion_tokens": 4, "max_tokens": 5}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": 0}, "stop"),
        ({"stop": {}}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream": 1.0}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"n": True}, "n"),
        ({"logprobs": 0}, "logprobs"),
        ({"user": 5}, "user"),
        ({"store": "yes"}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"model": "\ud800"}, "model"),
        ({"stop": ["\udfff"]}, "stop.0"),
        ({"\ud800": 1}, "\\ud800"),
        ({"tools": [[[[[]]]] * 2]}, "tools"),
    ],
)
def test_a_field_of_another_type_or_range_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as error:
        request(**fields)
    assert (error.value.status, error.value.field) == (400, field)
    json.dumps(error.value.to_json(), ensure_ascii=False).encode("utf-8")


def test_nesting_has_an_end() -> None:
    deep: Any = "x"
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ApiError, match="nested deeper"):
        request(metadata={"a": deep})


def test_numbers_that_json_does_not_know_are_no_json() -> None:
    with pytest.raises(ApiError, match="not JSON"):
        request(temperature=float("nan"))
