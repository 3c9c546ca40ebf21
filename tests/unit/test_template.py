"""Answers are found in rendered conversations without marks, or the template is refused with the place where it goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftcli.data.formats.chat import Chat
from ftcli.data.formats.detect import detect_format
from ftcli.data.sources.file import File
from ftcli.errors import DataError, RequestError
from ftcli.models.tokenizer import Tokenizer, load_tokenizer

HEADERS = """\
{{- bos_token }}{% for m in messages %}<|h|>{{ m.role }}<|e|>\n\n{{ m.content | trim }}<|eot|>{% endfor -%}
{% if add_generation_prompt %}<|h|>assistant<|e|>\n\n{% endif %}"""
# A generation prompt that opens a block of thoughts which no answer in the data has.
OPENS_THOUGHTS = """\
{%- for m in messages %}<|h|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor -%}
{% if add_generation_prompt %}<|h|>assistant\n<think>\n{% endif %}"""
# Thoughts are written for the last answer only.
DROPS_THOUGHTS = """\
{%- for m in messages %}<|h|>{{ m.role }}\n
{%- if m.role == 'assistant' and loop.last %}\n<think>\n\n</think>\n{% endif %}\n{{ m.content }}<|eot|>\n{% endfor -%}
{% if add_generation_prompt %}<|h|>assistant\n{% endif %}"""
# The last turn ends otherwise than the ones before it.
OTHER_LAST_END = """\
{%- for m in messages %}<|h|>{{ m.role }}\n{{ m.content }}
{{- '<|last|>' if loop.last and m.role == 'assistant' else '<|eot|>' }}{% endfor -%}
{% if add_generation_prompt %}<|h|>assistant\n{% endif %}"""
CLOSES = """\
{%- for m in messages %}<|h|>{{ m.role }}\n{{ m.content }}<|eot|>\n{% endfor -%}
{% if add_generation_prompt %}<|h|>assistant\n{% else %}{{ eos_token }}{% endif %}"""
CALLS = """\
{%- for m in messages %}<|h|>{{ m.role }}\n{{ m.content }}
{%- if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|call|>{% else %}<|eot|>{% endif %}{% endfor -%}
{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|h|>assistant\n{% endif %}"""
SPECIAL = ("<|h|>", "<|e|>", "<|eot|>", "<|call|>", "<|last|>")


def chat(*contents: str, **first: Any) -> list[dict[str, Any]]:
    """User and assistant in turns."""
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def trained(messages: list[dict[str, Any]], tokenizer: Tokenizer, **settings: Any) -> list[str]:
    (segment,) = Chat(**settings).example({"messages": messages}, tokenizer, "t:1").segments
    assert segment.text == tokenizer.render(messages)
    return [piece.text for piece in segment.pieces if piece.is_trained]


@pytest.mark.parametrize("template", [HEADERS, OPENS_THOUGHTS, CLOSES, CALLS])
def test_every_answer_is_found_with_its_end_and_nothing_more(make_tokenizer: Any, template: str) -> None:
    tokenizer = make_tokenizer(template, tokens=SPECIAL)
    assert tokenizer.end_of_turn == "<|eot|>"
    assert trained(chat("u", "first", "v", "second"), tokenizer) == ["first<|eot|>", "second<|eot|>"]
    assert trained(chat("u", "first", "v"), tokenizer) == ["first<|eot|>"]
    # What the author wrote may look like anything
    assert trained(chat("<|eot|>", "a<|eot|>b", "x", "first"), tokenizer) == ["a<|eot|>b<|eot|>", "first<|eot|>"]


def test_what_is_trained_begins_where_generation_begins(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(HEADERS, tokens=SPECIAL)
    messages = chat("u", "first", "v", "second")
    example = Chat().example({"messages": messages}, tokenizer, "t:1")
    pieces = example.segments[0].pieces
    assert pieces[0].text == tokenizer.render(messages[:1], add_generation_prompt=True)
    assert "".join(piece.text for piece in pieces[:3]) == tokenizer.render(messages[:3], add_generation_prompt=True)


def test_conversation_may_begin_with_an_answer(make_tokenizer: Any) -> None:
    messages = [{"role": "assistant", "content": "hello"}, *chat("u", "a")]
    assert trained(messages, make_tokenizer(HEADERS, tokens=SPECIAL)) == ["hello<|eot|>", "a<|eot|>"]
    needs_first = "{% if messages[0].role == 'system' %}{% endif %}" + HEADERS
    assert trained(messages, make_tokenizer(needs_first, tokens=SPECIAL)) == ["hello<|eot|>", "a<|eot|>"]


def test_turn_may_end_with_a_token_of_its_own(make_tokenizer: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [*chat("u"), call, {"role": "tool", "content": "r"}, *chat("", "done")[1:]]
    tokenizer = make_tokenizer(CALLS, tokens=SPECIAL)
    (segment,) = Chat().example({"messages": messages}, tokenizer, "t:1").segments
    assert [piece.text for piece in segment.pieces if piece.is_trained] == ["f<|call|>", "done<|eot|>"]


@pytest.mark.parametrize(("template", "difference"), [(DROPS_THOUGHTS, "<think>"), (OTHER_LAST_END, "last")])
def test_template_that_rewrites_earlier_answers_trains_the_last_one_or_is_refused(
    make_tokenizer: Any, template: str, difference: str
) -> None:
    tokenizer = make_tokenizer(template, tokens=SPECIAL)
    messages = chat("u", "first", "v", "second")
    with pytest.raises(DataError, match="not prefix-preserving: up to message 2 it writes") as caught:
        trained(messages, tokenizer)
    (problem,) = caught.value.problems
    assert problem.where == "t:1"
    assert difference in problem.what
    assert problem.hint == "`format.turns: last` trains the last answer only"
    (last,) = trained(messages, tokenizer, turns="last")
    assert "second" in last
    assert "first" not in last


def test_template_that_drops_the_system_prompt_once_it_is_answered_is_refused(make_tokenizer: Any) -> None:
    moves = (
        "{% for m in messages if m.role != 'system' %}<|h|>{{ m.role }}\n"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}{{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|h|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(moves, tokens=SPECIAL)
    assert trained(chat("u", "a"), tokenizer) == ["a<|eot|>"]
    with pytest.raises(DataError, match="not prefix-preserving: up to message 3"):
        trained([{"role": "system", "content": "s"}, *chat("u", "a")], tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|eot|>{% endfor %}", "writes no end-of-turn token"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "writes no end-of-turn token"),
        ("{{ raise_exception('only on Sundays') }}", "writes no end-of-turn token"),
    ],
)
def test_template_that_never_ends_an_answer_is_refused(make_tokenizer: Any, template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        trained(chat("u", "a"), make_tokenizer(template, tokens=SPECIAL))


def test_template_says_why_it_refuses_a_conversation(make_tokenizer: Any) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}" + HEADERS
    with pytest.raises(DataError, match="t:1: the chat template says: no system prompts"):
        trained([{"role": "system", "content": "s"}, *chat("u", "a")], make_tokenizer(refuses, tokens=SPECIAL))


@pytest.mark.parametrize(
    ("row", "dropped"),
    [
        ({"messages": [*chat("u"), {"role": "tool", "content": "r"}, *chat("u", "a")[1:]]}, "message 2, of role `tool`"),
        ({"messages": chat("u", "a"), "tools": [{"name": "look_up"}]}, "the tools"),
        (
            {"messages": [*chat("u"), {"role": "assistant", "content": "so", "tool_calls": [{"function": {"name": "look_up"}}]}]},
            "the tool calls of message 2",
        ),
        (
            {"messages": [*chat("u"), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]},
            "message 2, an answer",
        ),
    ],
)
def test_template_that_leaves_something_out_is_refused(make_tokenizer: Any, row: dict[str, Any], dropped: str) -> None:
    ignores = "{% for m in messages if m.role in ('user', 'assistant') %}<|h|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}"
    tokenizer = make_tokenizer(ignores + "{% if add_generation_prompt %}<|h|>assistant\n{% endif %}", tokens=SPECIAL)
    with pytest.raises(DataError, match=f"the chat template leaves out {dropped}"):
        Chat().example(row, tokenizer, "t:1")


def test_base_model_without_template_is_pointed_to_one_that_it_can_use(make_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match=r"`model.template: plain`"):
        trained(chat("u", "a"), make_tokenizer(None, tokens=()))
    with pytest.raises(RequestError, match=r"`model.template: chatml`"):
        trained(chat("u", "a"), make_tokenizer(None, tokens=("<|im_start|>", "<|im_end|>")))


@pytest.mark.parametrize(
    ("name", "tokens", "bos", "expected"),
    [
        ("chatml", ("<|im_start|>", "<|im_end|>"), False, "a<|im_end|>"),
        ("chatml", (), True, "a<|im_end|></s>"),
        ("plain", (), False, "a</s>"),
        ("plain", (), True, "a</s>"),
    ],
)
def test_own_templates_end_every_answer_with_a_token_that_generation_stops_at(
    tokenizer_folder: Any, name: str, tokens: tuple[str, ...], bos: bool, expected: str
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder(tokens=tokens, bos=bos)), template=name)
    messages = [{"role": "system", "content": "s"}, *chat("u", "a", "v", "a")]
    assert trained(messages, tokenizer) == [expected, expected]
    assert tokenizer.encode(expected)[0][-1] in tokenizer.stop_ids
    assert tokenizer.render(messages).count("<s>") == int(bos)


@pytest.mark.real
@pytest.mark.parametrize("folder", ["mistral-v3", "phi-3-mini"])
@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "oasst_multi_turn.jsonl", "fastchat_dummy_sharegpt.jsonl"])
def test_answers_of_real_chats_are_the_words_of_the_rows(shared: Path, folder: str, name: str) -> None:
    tokenizer = load_tokenizer(str(shared / "data/tokenizers" / folder))
    end = {"mistral-v3": "</s>", "phi-3-mini": "<|end|>"}[folder]
    rows = [row for _, row in File(path=str(shared / "data" / name)).rows()][:300]
    settings = detect_format(rows)
    for row in rows:
        turns = row.get("messages") or row["conversations"]
        answers = [turn.get("content", turn.get("value")) for turn in turns if turn.get("role", turn.get("from")) in ("assistant", "gpt")]
        pieces = settings.example(row, tokenizer, name).segments[0].pieces
        found = [piece.text for piece in pieces if piece.is_trained]
        assert all(text.endswith(end) for text in found)
        assert [text.removesuffix(end).strip() for text in found] == [answer.strip() for answer in answers]


@pytest.mark.real
@pytest.mark.parametrize(("folder", "reason"), [("phi-3-mini", "leaves out"), ("mistral-v3", "Tool call IDs should be")])
def test_tool_calls_are_refused_by_templates_that_cannot_write_them(shared: Path, folder: str, reason: str) -> None:
    tokenizer = load_tokenizer(str(shared / "data/tokenizers" / folder))
    where, row = next(File(path=str(shared / "data/bfcl_tools.jsonl")).rows())
    with pytest.raises(DataError, match=reason):
        Chat().example(row, tokenizer, where)
