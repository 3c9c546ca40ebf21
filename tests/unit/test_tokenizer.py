"""Ids, rendered text and saved files are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcli.errors import RequestError
from ftcli.models.tokenizer import Tokenizer, load_tokenizer

FOLDERS = [
    "data/tokenizers/gpt2",
    "data/tokenizers/mistral-v3",
    "data/tokenizers/phi-3-mini",
    "models/stories260K",
    "models/babyllama-361",
    "models/gpt2-mini-pd",
]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What templates of models use: loop controls, tojson, generation marks, whitespace control, namespaces, the date, undefined names.
EVERYTHING = """
{%- set ns = namespace(first=true) -%}
{% generation %}{% set mark = 1 %}{% endgeneration %}{{ mark is defined }}{{ bos_token }}{{ undefined_name }}{% for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{% set inner = message.content | trim %}{{ inner }}{{ eos_token }}{% endgeneration %}
    {% else %}
  {{ message | tojson }} {{ {"ü": "<&>"} | tojson(indent=2) }}
    {% endif %}
{%- if message.reasoning_content %}[{{ message.reasoning_content }}]{% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}{{ strftime_now("%Y") }}{{ inner is defined }}
{%- if add_generation_prompt %}>{% endif %}
"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b> ü"}],
    [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": " b "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "thinking": "hm"},
        {"role": "user", "content": "c", "name": None},
    ],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def naughty(shared: Path) -> list[str]:
    texts: list[str] = json.loads((shared / "data/robustness/blns/blns.json").read_text(encoding="utf-8"))
    specials = ["<|user|>\nHi <|end|>\n<|assistant|>\n Hello<|end|>\n<|endoftext|>", "<s>a</s> b", "</s>  b", " ", "  lead", "a\n\nb"]
    return [*texts, *specials, "<s>[INST] hi[/INST] yo</s>[INST] b[/INST]"]


@pytest.mark.real
@pytest.mark.parametrize("folder", FOLDERS)
def test_ids_are_those_of_transformers(shared: Path, naughty: list[str], folder: str) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(shared / folder)
    tokenizer = load_tokenizer(str(shared / folder))
    assert [tokenizer.encode(text)[0] for text in naughty] == other(naughty, add_special_tokens=False)["input_ids"]
    assert tokenizer.adds_bos == (other("a")["input_ids"][:1] == [other.bos_token_id])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (other.bos_token_id, other.eos_token_id, other.pad_token_id)
    assert tokenizer.vocab_size == len(other)


@pytest.mark.real
@pytest.mark.parametrize("folder", FOLDERS)
def test_decoding_gives_the_text_that_was_encoded(shared: Path, naughty: list[str], folder: str) -> None:
    tokenizer = load_tokenizer(str(shared / folder))
    # A tokenizer that strips blanks around special tokens cannot give them back, and none gives back a leading blank it adds itself
    texts = [text for text in naughty if text and not any(token in text for token in tokenizer.added_texts) and not text.startswith(" ")]
    assert len(texts) > 500
    assert [tokenizer.decode(tokenizer.encode(text)[0]) for text in texts] == texts


@pytest.mark.real
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(
    ("folder", "template"),
    [("mistral-v3", None), ("phi-3-mini", None), ("gpt2", CHATML), ("phi-3-mini", EVERYTHING), ("gpt2", "chatml"), ("mistral-v3", "plain")],
)
def test_rendered_text_is_that_of_transformers(shared: Path, folder: str, template: str | None, add_generation_prompt: bool) -> None:
    from transformers import AutoTokenizer

    path = shared / "data/tokenizers" / folder
    tokenizer = load_tokenizer(str(path), template=template)
    other = AutoTokenizer.from_pretrained(path)
    for chat in CHATS:
        for tools in (None, TOOLS):
            given: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": tools}
            expected = other.apply_chat_template(chat, tokenize=False, chat_template=tokenizer.chat_template, **given)
            assert tokenizer.render(chat, **given) == expected


@pytest.mark.real
@pytest.mark.parametrize("template", [None, "chatml"])
def test_saved_tokenizer_is_loaded_by_transformers_with_its_template(shared: Path, tmp_path: Path, template: str | None) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(str(shared / "data/tokenizers/phi-3-mini"), template=template)
    tokenizer.save(tmp_path / "saved")
    other = AutoTokenizer.from_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    chat = CHATS[1]
    assert other.apply_chat_template(chat, tokenize=False) == again.render(chat) == tokenizer.render(chat)
    assert other("Hello  <|end|> x", add_special_tokens=False)["input_ids"] == tokenizer.encode("Hello  <|end|> x")[0]


@pytest.mark.real
def test_folder_without_tokenizer_json_is_converted_once(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTCLI_CACHE", str(tmp_path / "cache"))
    model = json.loads((shared / "data/tokenizers/gpt2/tokenizer.json").read_text(encoding="utf-8"))["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}', encoding="utf-8")
    expected = load_tokenizer(str(shared / "data/tokenizers/gpt2")).encode("Hello  world<|endoftext|>")
    assert load_tokenizer(str(folder)).encode("Hello  world<|endoftext|>") == expected
    (kept,) = (tmp_path / "cache").rglob("tokenizer.json")
    written = kept.stat().st_mtime_ns
    assert load_tokenizer(str(folder)).encode("Hello  world<|endoftext|>") == expected
    assert kept.stat().st_mtime_ns == written


def test_encoding_adds_no_special_token_and_recognises_those_in_the_text(make_tokenizer: Any) -> None:
    tokenizer: Tokenizer = make_tokenizer(bos=True)
    ids, offsets = tokenizer.encode("ab</s>")
    assert len(ids) == 3
    assert ids[-1] == tokenizer.eos_id
    assert offsets == [(0, 1), (1, 2), (2, 6)]
    assert tokenizer.adds_bos


@pytest.mark.parametrize(("given", "expected"), [(True, True), (False, False)])
def test_configuration_says_whether_bos_is_added_before_the_post_processor_does(make_tokenizer: Any, given: bool, expected: bool) -> None:
    assert make_tokenizer(bos=not given, add_bos_token=given).adds_bos is expected


def test_generation_stops_at_eos_the_end_of_turn_and_the_ids_of_the_generation_configuration(tokenizer_folder: Any) -> None:
    folder = tokenizer_folder(template=CHATML, tokens=("<|im_start|>", "<|im_end|>", "<|stop|>"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 260]}', encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    assert [tokenizer.backend.id_to_token(token) for token in tokenizer.stop_ids] == ["</s>", "<|im_end|>", "<|stop|>"]
    assert tokenizer.end_of_turn == "<|im_end|>"


def test_special_tokens_are_read_in_every_form(tokenizer_folder: Any) -> None:
    folder = tokenizer_folder(bos_token={"content": "<s>", "lstrip": False}, eos_token=None)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": {"content": "</s>"}}', encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")


def test_eos_comes_from_the_model_configuration_where_no_file_names_it(tokenizer_folder: Any) -> None:
    folder = tokenizer_folder(eos_token=None)
    assert load_tokenizer(str(folder)).eos_token is None
    (folder / "config.json").write_text('{"eos_token_id": 257}', encoding="utf-8")
    assert load_tokenizer(str(folder)).eos_token == "</s>"


def test_tool_template_is_used_when_there_are_tools(tokenizer_folder: Any) -> None:
    named = [{"name": "default", "template": "plain chat"}, {"name": "tool_use", "template": "with tools"}]
    tokenizer = load_tokenizer(str(tokenizer_folder(template=named)))
    assert tokenizer.render(CHATS[0]) == "plain chat"
    assert tokenizer.render(CHATS[0], tools=TOOLS) == "with tools"
    again = tokenizer.folder.parent / "saved"
    tokenizer.save(again)
    assert load_tokenizer(str(again)).templates == tokenizer.templates


def test_template_file_goes_before_the_template_in_the_configuration(tokenizer_folder: Any) -> None:
    folder = tokenizer_folder(template="old")
    (folder / "chat_template.jinja").write_text("new\r\n", encoding="utf-8", newline="")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.chat_template == "new\r\n"
    assert tokenizer.fingerprint != load_tokenizer(str(folder), template="{{ other }}").fingerprint


def test_template_reaches_nothing_but_its_arguments(make_tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="unsafe"):
        make_tokenizer("{{ messages.__class__.__mro__ }}").render(CHATS[0])
    with pytest.raises(RequestError, match=r"unsafe|immutable|SandboxedEnvironment|says"):
        make_tokenizer("{{ messages.append(1) }}").render(CHATS[0])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatlm", "did you mean `chatml`"),
        ("{% for %}", "model.template: line 1 of the template"),
        ("nowhere.jinja", "there is no file `nowhere.jinja`"),
    ],
)
def test_unusable_template_is_refused(tokenizer_folder: Any, template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_tokenizer(str(tokenizer_folder()), template=template)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
    ],
)
def test_broken_tokenizer_file_is_named(tokenizer_folder: Any, name: str, content: str, message: str) -> None:
    folder = tokenizer_folder()
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        load_tokenizer(str(folder))


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RequestError, match=r"has no tokenizer.json \(files: config.json\)"):
        load_tokenizer(str(tmp_path))


def test_missing_model_folder_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    with pytest.raises(RequestError, match=r"did you mean `.*/llama`"):
        load_tokenizer(str(tmp_path / "lama"))


def test_template_without_end_of_turn_makes_no_stop_id_of_its_own(make_tokenizer: Any) -> None:
    tokenizer: Tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert tokenizer.end_of_turn is None
    assert tokenizer.stop_ids == (tokenizer.eos_id,)
