"""`ftcli generate` and `ftcli chat`: prompts in, answers out, and what a user reads when there are none."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.fake_run import write_fake_run
from tests.tiny_chat_model import write_tiny_chat_model

from ftcli.cli.main import run as run_command
from ftcli.errors import UsageError
from ftcli.exporting.open_target import open_target
from ftcli.models.generate import generate
from ftcli.models.prompts import Prompt, read_prompts, render_prompt
from ftcli.models.tokenizer import load_tokenizer

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "talking"
    write_tiny_chat_model(path)
    return str(path)


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """Runs `ftcli ...` in an empty folder with text on stdin; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def _say(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = run_command(arguments)
        out, err = capfd.readouterr()
        return code, out, err

    return _say


def expected(model: str, *texts: str, max_new_tokens: int = 6) -> list[str]:
    """The answers to texts as they are."""
    loaded = open_target(model, device="cpu")
    return [answer.text for answer in generate(loaded.model, loaded.tokenizer, texts, max_new_tokens=max_new_tokens)]


def test_a_prompt_goes_through_the_template_unless_raw(say: Say, model: str) -> None:
    options = ("--max-new-tokens", "6", "--device", "cpu")
    whole, plain = expected(model, "system: S</s>user: hi</s>assistant: ", "hi")
    assert say("generate", model, "hi", "--system", "S", *options) == (0, whole + "\n", "")
    assert say("generate", model, "hi", "--raw", *options) == (0, plain + "\n", "")


def test_many_prompts_are_answered_in_their_order(say: Say, model: str, tmp_path: Path) -> None:
    rows = [{"prompt": "hi"}, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the reference"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, err = say("generate", model, "--prompt-file", str(file), "--max-new-tokens", "6", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [row["answer"] for row in report["answers"]] == expected(model, "user: hi</s>assistant: ", "user: a</s>assistant: ")
    assert report["answers"][1]["prompt"] == rows[1]["messages"][:1]
    assert report["answers"][0]["num_tokens"] == 6
    assert report["answers"][0]["stopped"] is False


def test_prompts_come_from_stdin(say: Say, model: str) -> None:
    answers = expected(model, "hi", "a")
    code, out, _ = say("generate", model, "--raw", "--max-new-tokens", "6", stdin=b"hi\n\na\r\n")
    assert (code, out) == (0, "\n\n".join(answers) + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "--top-p", "0.5"], "error: --top-p needs a --temperature above 0\n  hint: --temperature 0.8\n"),
        (["hi", "--top-p", "1.5", "--temperature", "1"], "error: --top-p 1.5: not above 0 and at most 1\n"),
        (["hi", "--prompt-file", "x"], "error: both a prompt and --prompt-file are given\n  hint: give one of them\n"),
        (["--prompt-file", "x"], "error: the prompt file `x` cannot be read: no such file or directory\n"),
        (["hi", "--raw", "--system", "S"], "error: --system needs a chat template, and --raw uses none\n"),
        ([], "error: there is no prompt in stdin\n"),
        (["hi", "--device", "tpu"], "error: --device tpu: there is no such device here\n  hint: auto, cpu\n"),
    ],
)
def test_a_wrong_request_is_told_in_words(
    arguments: list[str], message: str, say: Say, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert say("generate", model, *arguments) == (2, "", message)


def test_every_bad_line_of_a_prompt_file_is_named(say: Say, model: str) -> None:
    code, _, err = say("generate", model, stdin=b'{"prompt": "a"}\n{"text": 1}\n[]\n{"messages": []}\n{\n')
    assert code == 2
    assert "4 of the 5 prompts cannot be read" in err
    assert "stdin:2: has neither `prompt` nor `messages` (keys: text)" in err
    assert "stdin:5: is not valid JSON" in err


def test_prompts_that_are_not_utf_8_are_refused(say: Say, model: str) -> None:
    assert say("generate", model, stdin="größe".encode("latin-1")) == (2, "", "error: stdin is not UTF-8: byte 0xf6 at offset 2\n")


def test_a_prompt_that_is_too_long_is_refused(say: Say, model: str) -> None:
    code, _, err = say("generate", model, "x" * 80)
    assert code == 2
    assert "tokens leave no room for an answer in a context of 64" in err


def test_a_name_without_a_model_gets_a_hint(say: Say, tmp_path: Path) -> None:
    write_fake_run(tmp_path / "runs" / "orders")
    code, _, err = say("generate", "orders", "hi")
    assert (code, err) == (2, "error: there is no such model\n\n  `orders` does not exist\n    hint: did you mean `runs/orders`?\n")


def test_a_run_that_has_trained_nothing_yet_is_refused(say: Say, tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", status="running")
    (run / "adapter" / "adapter_config.json").unlink()
    code, _, err = say("generate", "run", "hi")
    assert code == 2
    assert "run: has neither `adapter/` nor a checkpoint: nothing has been trained yet" in err


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ("[1", "`adapter_config.json` is no JSON object"),
        ("{}", "`adapter_config.json` names no base model"),
        ('{"base_model_name_or_path": "x"}', "has no `adapter_model.safetensors`"),
    ],
)
def test_a_broken_adapter_is_refused(config: str, what: str, say: Say, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config)
    (folder / "adapter_model.bin").write_bytes(b"a pickle, which is never opened")
    code, _, err = say("generate", "./broken", "hi")
    assert (code, err) == (2, f"error: the adapter cannot be loaded\n\n  ./broken: {what}\n")


def test_a_file_of_plain_prompts_may_begin_with_a_byte_order_mark() -> None:
    assert [prompt.text for prompt in read_prompts(["\ufeffone\r\n", "  two\n", "\n"], "f")] == ["one", "  two"]
    assert read_prompts(['\ufeff{"prompt": "x"}'], "f") == [Prompt("x")]


def test_a_system_text_replaces_that_of_a_conversation(model: str) -> None:
    tokenizer = load_tokenizer(model)
    asked = Prompt(None, ({"role": "system", "content": "old"}, {"role": "user", "content": "hi"}))
    assert render_prompt(asked, tokenizer) == "system: old</s>user: hi</s>assistant: "
    assert render_prompt(asked, tokenizer, system="new") == "system: new</s>user: hi</s>assistant: "
    with pytest.raises(UsageError, match="a conversation needs a chat template"):
        render_prompt(asked, tokenizer, raw=True)


def test_piped_lines_are_turns_of_one_conversation(say: Say, model: str) -> None:
    first = expected(model, "user: hi</s>assistant: ")[0]
    second = expected(model, f"user: hi</s>assistant: {first}</s>user: a</s>assistant: ")[0]
    code, out, err = say("chat", model, "--max-new-tokens", "6", stdin=b"hi\na\n")
    assert (code, out, err) == (0, f"{first}\n{second}\n", "")


def test_chat_obeys_its_commands(say: Say, model: str) -> None:
    alone, told = expected(model, "user: a</s>assistant: ", "system: S</s>user: a</s>assistant: ")
    lines = b"hi\n/reset\na\n/system S\na\n/sytem\n\n/quit\na\n"
    code, out, err = say("chat", model, "--max-new-tokens", "6", stdin=lines)
    assert code == 0
    assert out.endswith(f"{alone}\n{told}\n")
    assert "the conversation is forgotten" in err
    assert "unknown command `/sytem`; did you mean `/system`?" in err


def test_a_long_conversation_drops_its_oldest_turns_and_says_so(say: Say, model: str) -> None:
    code, out, err = say("chat", model, "--max-new-tokens", "4", stdin=b"0123456789\n" * 4)
    assert code == 0
    assert "the 2 oldest turns are forgotten: the context holds 64 tokens" in err
    assert out.count("\n") >= 4


def test_a_turn_that_is_too_long_is_taken_back(say: Say, model: str) -> None:
    first, second = expected(model, "user: a</s>assistant: ", "user: b</s>assistant: ")
    code, out, err = say("chat", model, "--max-new-tokens", "6", stdin=b"x" * 90 + b"\na\n/reset\nb\n")
    assert (code, out) == (0, f"{first}\n{second}\n")
    assert "leave no room for an answer" in err
    assert "oldest turns" not in err


def test_a_model_without_a_template_cannot_be_talked_with(say: Say, tmp_path: Path) -> None:
    write_tiny_chat_model(tmp_path / "plain", template=None)
    code, _, err = say("chat", "./plain")
    assert code == 2
    assert "error: `./plain` has no chat template: it cannot be talked with\n" in err


def test_a_turn_that_is_no_utf_8_is_taken_back_and_the_talk_goes_on(say: Say, model: str) -> None:
    (whole,) = expected(model, "user: a</s>assistant: ")
    code, out, err = say("chat", model, "--max-new-tokens", "6", stdin=b"gr\xf6\xdfe\na\n")
    assert (code, out) == (0, whole + "\n")
    assert "a text is no Unicode" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["\udcff"], b"", "a text is no Unicode"),
        (["hi", "--system", "\ud800"], b"", "a text is no Unicode"),
        (["--json", "--prompt-file", "-"], b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', "stdin:2: holds half of a character"),
        (["hi", "--temperature", "nan"], b"", "`--temperature`"),
        (["hi", "--temperature", "inf"], b"", "--temperature inf: not a finite number"),
        (["hi", "--temperature", "1", "--seed", str(2**80)], b"", "seed"),
        (["--prompt-file", "-"], b'{"messages": [{"role": "user", "content": 5}]}', "messages.1 has a number as content"),
        (["--prompt-file", "-"], b'{"messages": [{"content": "a"}]}', "messages.1 has no role"),
        (["--prompt-file", "-"], b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "a part of type `image_url`"),
        (["--prompt-file", "-"], b'{"messages": [{"role": "user", "content": "a"}], "tools": [1]}', "is not a list of tool descriptions"),
    ],
)
def test_odd_input_is_refused_in_words(arguments: list[str], stdin: bytes, message: str, say: Say, model: str) -> None:
    code, out, err = say("generate", model, *arguments, stdin=stdin)
    assert code == 2
    assert message in err + out
    assert "Traceback" not in err


def test_a_temperature_near_nothing_takes_the_likeliest_token(say: Say, model: str) -> None:
    options = ("--raw", "--max-new-tokens", "6")
    assert say("generate", model, "hi", *options, "--temperature", "1e-300") == say("generate", model, "hi", *options)


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves() -> None:
    code = "from ftcli.cli.main import main; main(['chat', 'endless'])"
    process, terminal = pty.fork()
    if process == 0:
        # what runs in the background has it ignored, and its children would, too
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execvpe(sys.executable, [sys.executable, "-c", ENDLESS + code], {**os.environ, "TERM": "dumb"})
    screen = _read_until(terminal, "> ")
    os.write(terminal, b"hi\n")
    screen = _read_until(terminal, "tick tick")
    os.write(terminal, b"\x03")
    screen = _read_until(terminal, "> ")
    assert "(stopped)" in screen
    os.write(terminal, b"\x03")
    assert "Ctrl-D leaves" in _read_until(terminal, "> ", again=b"\x03")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# A model that needs no torch and whose answer never ends, so that there is something to stop.
ENDLESS = """
import itertools, time
from types import SimpleNamespace
import ftcli.exporting.open_target as opening
import ftcli.models.generate as generate
def stream(*_, **__):
    for _ in itertools.count():
        time.sleep(0.01)
        yield "tick "
tokenizer = SimpleNamespace(chat_template="{{ messages }}", render=lambda messages, **_: "")
opening.open_target = lambda *_, **__: SimpleNamespace(model=None, tokenizer=tokenizer, description="endless")
generate.stream, generate.context_length = stream, lambda model: None
"""


def _read_until(terminal: int, text: str, seconds: float = 60.0, again: bytes = b"") -> str:
    """What the terminal shows until `text` is in it; a key that a busy process may have missed is pressed `again`."""
    screen, end = "", time.monotonic() + seconds
    while text not in screen:
        assert time.monotonic() < end, screen
        if select.select([terminal], [], [], 5.0)[0]:
            screen += os.read(terminal, 4096).decode(errors="replace")
        elif again:
            os.write(terminal, again)
    return screen
