"""Rows become examples: what is trained, what is prompt, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from ftcli.data.example import Example, Piece, path_example, question_of
from ftcli.data.formats import Format
from ftcli.data.formats.chat import Chat
from ftcli.data.formats.completion import Completion
from ftcli.data.formats.detect import detect_format, unread_answer, unread_columns
from ftcli.data.formats.instruction import Instruction
from ftcli.data.formats.text import Text
from ftcli.data.sources.builtin import Builtin
from ftcli.data.sources.file import File
from ftcli.errors import DataError, RequestError
from ftcli.models.tokenizer import Tokenizer, load_tokenizer

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def pieces(example: Example) -> list[tuple[str, float, bool]]:
    (segment,) = example.segments
    return [(piece.text, piece.weight, piece.is_prompt) for piece in segment.pieces]


def trained(example: Example) -> list[tuple[str, float]]:
    return [(text, weight) for text, weight, is_prompt in pieces(example) if not is_prompt]


@pytest.fixture
def chatml(make_tokenizer: Any) -> Tokenizer:
    tokenizer: Tokenizer = make_tokenizer()
    return tokenizer


@pytest.fixture
def tools_chat(make_tokenizer: Any) -> Tokenizer:
    """With ftcli's own ChatML template, which writes tools and calls."""
    tokenizer: Tokenizer = make_tokenizer(None)
    return load_tokenizer(str(tokenizer.folder), template="chatml")


@pytest.fixture
def base(make_tokenizer: Any) -> Tokenizer:
    """Without a chat template, and with a BOS in front of texts."""
    tokenizer: Tokenizer = make_tokenizer(None, bos=True)
    return tokenizer


def test_text_is_trained_to_its_end(base: Tokenizer) -> None:
    example = Text().example({"text": "once"}, base, "t:1")
    assert pieces(example) == [("once</s>", 1.0, False)]
    assert example.add_bos
    assert pieces(Text(append_eos=False, text="body").example({"body": "x", "weight": 2}, base, "t:1")) == [("x", 2.0, False)]
    assert pieces(Text(weight=None).example({"text": "x", "weight": "heavy"}, base, "t:1")) == [("x</s>", 1.0, False)]


def test_completion_is_trained_and_its_prompt_is_not(base: Tokenizer) -> None:
    example = Completion().example({"prompt": "1+1=", "completion": "2", "weight": 0.5}, base, "t:1")
    assert pieces(example) == [("1+1=", 0.5, True), ("2</s>", 0.5, False)]
    assert example.add_bos
    assert pieces(Completion(append_eos=False).example({"prompt": "", "completion": "2"}, base, "t:1")) == [("2", 1.0, False)]


@pytest.mark.parametrize("prompt", ["q", [USER], [USER, ASSISTANT, USER]])
def test_completion_of_messages_is_a_chat_whose_last_answer_is_trained(chatml: Tokenizer, prompt: Any) -> None:
    example = Completion().example({"prompt": prompt, "completion": [ASSISTANT]}, chatml, "t:1")
    assert trained(example) == [("a<|im_end|>", 1.0)]
    assert not example.add_bos


def test_instruction_is_rendered_as_a_chat_where_there_is_a_template(chatml: Tokenizer, base: Tokenizer) -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "s"}
    chat = Instruction().example(row, chatml, "t:1")
    assert pieces(chat)[0][0] == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nadd\n\n1 2<|im_end|>\n<|im_start|>assistant\n"
    assert trained(chat) == [("3<|im_end|>", 1.0)]
    plain = [("s\n\nInstruction:\nadd\n\nInput:\n1 2\n\nOutput:\n", 1.0, True), ("3</s>", 1.0, False)]
    assert pieces(Instruction().example(row, base, "t:1")) == plain
    assert pieces(Instruction(style="plain").example(row, chatml, "t:1")) == plain
    with pytest.raises(RequestError, match="has no chat template"):
        Instruction(style="chat").example(row, base, "t:1")


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": None}])
def test_instruction_without_input_has_none(base: Tokenizer, extra: dict[str, Any]) -> None:
    example = Instruction().example({"instruction": "add", "output": "3", **extra}, base, "t:1")
    assert pieces(example)[0][0] == "Instruction:\nadd\n\nOutput:\n"


def test_chat_trains_every_answer_with_the_weight_of_its_turn_and_row(chatml: Tokenizer) -> None:
    row = {"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "train": False}, USER, {**ASSISTANT, "weight": 0.5}], "weight": 3}
    example = Chat().example(row, chatml, "t:1")
    assert trained(example) == [("a<|im_end|>", 3.0), ("a<|im_end|>", 0.0), ("a<|im_end|>", 1.5)]
    assert not example.add_bos
    assert example.segments[0].text == chatml.render([{k: m[k] for k in ("role", "content")} for m in row["messages"]])
    assert trained(Chat(turns="last").example(row, chatml, "t:1")) == [("a<|im_end|>", 1.5)]


def test_sharegpt_turns_are_the_same_chat(chatml: Tokenizer) -> None:
    names = [("system", "s"), ("human", "q"), ("gpt", "a"), ("observation", "o"), ("chatgpt", "b")]
    row = {"conversations": [{"from": name, "value": text} for name, text in names]}
    roles = [("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "o"), ("assistant", "b")]
    same = {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in roles]}
    settings = detect_format([row])
    assert settings == Chat(messages="conversations")
    assert settings.example(row, chatml, "t:1") == Chat().example(same, chatml, "t:1")


def test_system_column_is_used_when_the_messages_have_none(chatml: Tokenizer) -> None:
    assert (
        Chat().example({"messages": [USER, ASSISTANT], "system": "s"}, chatml, "t:1").segments[0].text.startswith("<|im_start|>system\ns<")
    )
    own = [{"role": "system", "content": "own"}, USER, ASSISTANT]
    assert "outer" not in Chat().example({"messages": own, "system": "outer"}, chatml, "t:1").segments[0].text
    assert "outer" not in Chat(system=None).example({"messages": [USER, ASSISTANT], "system": "outer"}, chatml, "t:1").segments[0].text


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("form", ["tool_calls", "function_call", "sharegpt"])
def test_tool_calls_are_trained_with_their_arguments_as_objects(tools_chat: Tokenizer, arguments: Any, form: str) -> None:
    call = {"name": "f", "arguments": arguments}
    turn = {
        "tool_calls": {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        "function_call": {"role": "assistant", "content": "", "function_call": call},
        "sharegpt": {"from": "function_call", "value": json.dumps(call)},
    }[form]
    tools = json.dumps([{"name": "f", "description": "d"}])
    example = Chat().example({"messages": [USER, turn, {"role": "tool", "content": "r"}, ASSISTANT], "tools": tools}, tools_chat, "t:1")
    expected = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert trained(example) == [(expected, 1.0), ("a<|im_end|>", 1.0)]
    assert '{"type": "function", "function": {"name": "f", "description": "d"}}' in example.segments[0].text


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [USER, {**ASSISTANT, "train": False}],
        [USER, {**ASSISTANT, "weight": 0}],
        [USER, {**ASSISTANT, "content": "", "train": False}],
    ],
)
def test_a_chat_without_a_trained_answer_is_an_example_without_pieces(chatml: Tokenizer, messages: list[dict[str, Any]]) -> None:
    assert pieces(Chat().example({"messages": messages}, chatml, "t:1")) == []


def test_an_empty_answer_may_stand_where_it_is_not_trained(chatml: Tokenizer) -> None:
    row = {"messages": [USER, {**ASSISTANT, "content": "", "train": False}, USER, ASSISTANT]}
    assert trained(Chat().example(row, chatml, "t:1")) == [("<|im_end|>", 0.0), ("a<|im_end|>", 1.0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"mesages": [USER, ASSISTANT]}, r"column `messages` is not there \(columns: mesages\)\n    hint: did you mean `mesages`"),
        ({"messages": "hello"}, "column `messages` is a text, not a list of messages"),
        ({"messages": []}, "column `messages` has no messages"),
        ({"messages": ["hi", ASSISTANT]}, "messages.1 is a text, not a message"),
        ({"messages": [{"content": "q"}, ASSISTANT]}, r"messages.1 has no role \(keys: content\)"),
        ({"messages": [{"role": "asistant", "content": "q"}, ASSISTANT]}, "unknown role `asistant`\n    hint: did you mean `assistant`"),
        ({"messages": [{"role": "zzz", "content": "q"}, ASSISTANT]}, "allowed are system, developer, user, assistant, tool, human"),
        ({"messages": [{"role": "user", "content": 3}, ASSISTANT]}, "messages.1 has a number as content, not a text"),
        ({"messages": [{"role": "user", "content": None}, ASSISTANT]}, "messages.1 has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, "a part of type `image_url`"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages.2 is an empty answer"),
        ({"messages": [{**USER, "train": True}, ASSISTANT]}, "only answers of the assistant can be marked"),
        ({"messages": [USER, {**ASSISTANT, "train": "no"}]}, "messages.2.train is `no`, neither true nor false"),
        ({"messages": [USER, {**ASSISTANT, "weight": -1}]}, "messages.2.weight is `-1`, not a number from 0 up"),
        ({"messages": [USER, ASSISTANT], "weight": "much"}, "column `weight` is `much`, not a number"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "tools is not valid JSON"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"function": {}}]}]}, "messages.2.tool_calls.1 has no function name"),
    ],
)
def test_row_that_is_no_chat_is_refused_by_turn(chatml: Tokenizer, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Chat().example(row, chatml, "chats.jsonl:7")
    assert caught.value.problems[0].where == "chats.jsonl:7"


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        (Text(), {"txt": "x"}, "column `text` is not there .*\n.*did you mean `txt`"),
        (Text(), {"text": None}, "column `text` is null, not a text"),
        (Text(), {"text": " \n"}, "column `text` is empty"),
        (Completion(), {"prompt": "x", "completion": ""}, "column `completion` is empty"),
        (Completion(), {"prompt": 1, "completion": "x"}, "column `prompt` is a number"),
        (Instruction(), {"instruction": "x", "output": " "}, "column `output` is empty"),
        (Instruction(), {"instruction": "x", "input": 3, "output": "y"}, "column `input` is a number"),
        (Text(), {"text": "x", "weight": "nan"}, "column `weight` is `nan`"),
    ],
)
def test_row_that_does_not_fit_its_format_is_refused_by_column(
    base: Tokenizer, settings: Format, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        settings.example(row, base, "rows.jsonl:3")


def test_text_that_cannot_be_ended_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="set `append_eos: false`"):
        Text().example({"text": "x"}, make_tokenizer(None, eos_token=None), "t:1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT], "id": 1}, Chat()),
        ({"conversation": [{"from": "human", "value": "q"}]}, Chat(messages="conversation")),
        ({"prompt": "a", "completion": "b"}, Completion()),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Completion()),
        ({"question": "a", "answer": "b"}, Completion(prompt="question", completion="answer")),
        ({"instruction": "a", "input": "", "output": "b"}, Instruction()),
        ({"instruction": "a", "context": "", "response": "b"}, Instruction(input="context", output="response")),
        ({"text": "a", "label": 1}, Text()),
        ({"content": "a"}, Text(text="content")),
    ],
)
def test_format_is_detected_from_the_columns(row: dict[str, Any], expected: Format) -> None:
    assert detect_format([row]) == expected


def test_columns_that_are_not_read_are_known() -> None:
    assert unread_columns(Text(), ["text", "label", "weight"]) == ["label"]
    assert unread_columns(Chat(), ["messages", "tools", "id"]) == ["id"]


def test_a_column_that_looks_like_the_answer_and_is_not_read_is_told() -> None:
    assert unread_answer(Text(), ["text", "Label", "id"]) == "reads column text only; not read: Label, id"
    assert unread_answer(Completion(), ["prompt", "completion", "score"]) == "reads columns prompt, completion only; not read: score"
    assert unread_answer(Chat(), ["messages", "id"]) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "prompt": "b", "completion": "c"}, r"several formats: `completion` \(prompt, completion\), `text` \(text\)"),
        ({"instruction": "a", "output": "b", "text": "c"}, "`format: {kind: instruction}`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "look like preference pairs"),
        ({"question": "a", "choices": ["b"]}, "look like multiple-choice questions"),
        ({"mesages": [USER]}, "set `format: {kind: chat, messages: mesages}`"),
        ({"txt": "a"}, "set `format: {kind: text, text: txt}`"),
        ({"zzz": "a"}, r"columns \(zzz\) fit no format\n.*chat \(messages\), completion \(prompt, completion\)"),
        ({"messages": "not a list"}, r"columns \(messages\) fit no format"),
    ],
)
def test_ambiguous_and_unknown_columns_are_refused_with_what_would_fit(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        detect_format([row], "data.jsonl")


def test_question_of_an_example_is_everything_before_its_last_answer() -> None:
    example = path_example(
        [Piece("u", 1.0, True), Piece("a</s>", 1.0, False), Piece("v", 1.0, True), Piece("b</s>", 1.0, False)], add_bos=True
    )
    assert question_of(example) == ("ua</s>v", "b</s>")
    assert question_of(example, ["</s>"]) == ("ua</s>v", "b")
    assert question_of(path_example([Piece("u", 1.0, True), Piece("a", 0.0, False)], add_bos=False)) == ("", "")


def test_tokenizer_travels_to_other_processes(chatml: Tokenizer) -> None:
    row = {"messages": [USER, ASSISTANT]}
    again = pickle.loads(pickle.dumps(chatml))
    assert Chat().example(row, again, "t:1") == Chat().example(row, chatml, "t:1")


@pytest.mark.parametrize(("name", "kind"), [("stories", "text"), ("clinic", "text"), ("orders", "chat")])
def test_builtin_data_sets_are_detected(name: str, kind: str) -> None:
    for split in ("train", "test"):
        source = Builtin(name=name, split=split)
        where, row = next(source.rows())
        assert where == f"builtin:{name}/{split}:1"
        assert detect_format([row]).kind == kind
    assert len({Builtin(name=name, split=split).fingerprint() for split in ("train", "test")}) == 2


@pytest.mark.real
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gsm8k_train.jsonl", "chat"),
        ("oasst_multi_turn.jsonl", "chat"),
        ("bfcl_tools.jsonl", "chat"),
        ("fastchat_dummy_sharegpt.jsonl", "chat"),
        ("self_instruct_seed.jsonl", "instruction"),
        ("humaneval.jsonl", "completion"),
        ("svamp.jsonl", "completion"),
        ("sql_eval_pg.jsonl", "completion"),
        ("corpus_grimm.jsonl", "text"),
        ("banking77_train.jsonl", "text"),
        ("formats/alpaca.json", "instruction"),
        ("formats/alpaca.jsonl.gz", "instruction"),
        ("formats/alpaca.parquet", "instruction"),
        ("formats/banking77_600.csv", "text"),
        ("formats/banking77_600.tsv", "text"),
        ("formats/grimm_bom_crlf.txt", "text"),
        ("formats/gsm8k_messages.parquet", "chat"),
        ("formats/tinyshakespeare.txt", "text"),
    ],
)
def test_every_real_row_becomes_an_example_of_the_detected_format(shared: Path, path: str, expected: str) -> None:
    tokenizer = load_tokenizer(str(shared / "models/stories260K"), template="plain")
    rows = list(File(path=str(shared / "data" / path)).rows())
    settings = detect_format([row for _, row in rows[:64]], path)
    assert settings.kind == expected
    for where, row in rows[:600]:
        example = settings.example(row, tokenizer, where)
        assert example.num_trained > 0
        assert all(piece.text.endswith("</s>") for piece in example.segments[0].pieces if piece.is_trained)
        assert example.segments[0].text.count("<s>") + example.add_bos == 1
