"""`ftcli export --to ollama`: the Go template writes what the chat template writes, or the export is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftcli.errors import RequestError
from ftcli.exporting.go_template import BATTERY, turn_texts
from ftcli.models.templates import own_template
from ftcli.models.tokenizer import Tokenizer

HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_IN_QUESTION = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}{{ m.content }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": own_template("chatml", adds_bos=False, has_chatml_tokens=True),
    "plain": own_template("plain", adds_bos=True, has_chatml_tokens=False),
    "headers": HEADERS,
    "default system": DEFAULT_SYSTEM,
    "system in the question": SYSTEM_IN_QUESTION,
    "inst": INST,
}


class GoTemplate:
    """As much of Go's template language as ftcli writes: literals, if, else if, range, eq, ne, and, not, len, slice."""

    def __init__(self, text: str) -> None:
        self.parts = re.split(r"\{\{(.*?)\}\}(?=\{\{|$|[^}])", text)
        assert all(not plain for plain in self.parts[::2]), "text outside of actions"
        self.actions = [part.strip() for part in self.parts[1::2]]

    def render(self, messages: list[dict[str, str]]) -> str:
        system = next((message["content"] for message in messages if message["role"] == "system"), "")
        self.at, self.messages, self.system = 0, messages, system
        return "".join(self._block({}))

    def _block(self, scope: dict[str, Any], runs: bool = True) -> Iterator[str]:
        while self.at < len(self.actions):
            action = self.actions[self.at]
            if action == "end" or action.startswith("else if"):
                return
            self.at += 1
            if action.startswith("range"):
                yield from self._range(scope, runs)
            elif action.startswith("if "):
                yield from self._if(action[3:], scope, runs)
            elif action.startswith("$last :="):
                scope["$last"] = len(self.messages) - scope["$i"] == 1
            elif runs:
                yield json.loads(action) if action.startswith('"') else {".Content": scope["message"]["content"]}[action]

    def _range(self, scope: dict[str, Any], runs: bool) -> Iterator[str]:
        start = self.at
        for index, message in enumerate(self.messages):
            self.at = start
            yield from self._block({**scope, "$i": index, "message": message}, runs)
        assert self.actions[self.at] == "end"
        self.at += 1

    def _if(self, condition: str, scope: dict[str, Any], runs: bool) -> Iterator[str]:
        is_done = False
        while True:
            holds = runs and not is_done and self._holds(condition, scope)
            is_done = is_done or holds
            yield from self._block(scope, holds)
            action = self.actions[self.at]
            self.at += 1
            if action == "end":
                return
            condition = action.removeprefix("else if ")

    def _holds(self, condition: str, scope: dict[str, Any]) -> bool:
        if found := re.fullmatch(r'eq \.Role "(\w+)"', condition):
            return bool(scope["message"]["role"] == found[1])
        if condition == "not .System":
            return not self.system
        if condition == "not $last":
            return not scope["$last"]
        assert condition == 'and $last (ne .Role "assistant")', condition
        return bool(scope["$last"] and scope["message"]["role"] != "assistant")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_what_the_chat_template_writes(name: str, make_tokenizer: Callable[..., Tokenizer]) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    go = GoTemplate(turn_texts(tokenizer).go(None))
    others = [[{"role": "system", "content": "a"}, {"role": "user", "content": "b\n"}], [{"role": "user", "content": 'ü {{ }} \\ "'}]]
    for messages in [*BATTERY, *(others[1:] if name == "headers" else others)]:
        assert go.render([dict(message) for message in messages]) == tokenizer.render(messages, add_generation_prompt=True)


def test_a_token_that_the_runtime_puts_in_front_is_not_written_twice(make_tokenizer: Callable[..., Tokenizer]) -> None:
    tokenizer = make_tokenizer(TEMPLATES["plain"])
    assert GoTemplate(turn_texts(tokenizer).go("<s>")).render([{"role": "user", "content": "Hi"}]) == "User:\nHi\n\nAssistant:\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_of_another_kind_is_refused(template: str, make_tokenizer: Callable[..., Tokenizer]) -> None:
    with pytest.raises(RequestError, match="cannot become a Go template"):
        turn_texts(make_tokenizer(template))


def test_a_folder_for_ollama_stops_where_training_stopped(make_tokenizer: Callable[..., Tokenizer], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    from ftcli.exporting.export import export
    from ftcli.exporting.formats.ollama import Ollama
    from ftcli.models.load import load_model, save_model
    from ftcli.models.settings import Init, Model

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    for name, template in (("talks", TEMPLATES["chatml"]), ("continues", None)):
        tokenizer = make_tokenizer(template)
        save_model(load_model(Model(init=Init(architecture="llama", config=sizes)), tokenizer), tokenizer, tmp_path / name)
        report = export([str(tmp_path / name)], Ollama("q8_0"), tmp_path / f"{name}-out")
        modelfile = (tmp_path / f"{name}-out" / "Modelfile").read_text()
        assert f"FROM ./{name}-q8_0.gguf" in modelfile
        assert (tmp_path / f"{name}-out" / f"{name}-q8_0.gguf").is_file()
        assert ('PARAMETER stop "<|im_end|>"' in modelfile) == (template is not None)
        assert ('TEMPLATE """{{ .Prompt }}"""' in modelfile) == (template is None)
        assert report.checks[-1].passed is None
