"""`ftcli serve`: every request gets its own adapter's answer, or a 4xx that says why not."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.tiny_chat_model import write_tiny_chat_model

from ftcli.cli.main import run

NAMES = ("red", "green", "blue")
MAX_TOKENS = 8


def write_adapters(folder: Path, base: Path) -> None:
    """Three LoRA adapters with random factors, far enough apart to answer differently."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(NAMES):
        module = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        module.peft_config["default"].base_model_name_or_path = str(base)
        module.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three adapters."""
    folder = tmp_path_factory.mktemp("serve")
    write_tiny_chat_model(folder / "base")
    write_adapters(folder, folder / "base")
    return folder


@pytest.fixture(scope="module")
def serving(folders: Path) -> Iterator[Any]:
    """A server on a free port, in this process."""
    from ftcli.serving.engine import Engine
    from ftcli.serving.models import serve_models
    from ftcli.serving.server import Limits, Server

    served = serve_models(str(folders / "base"), {name: str(folders / name) for name in NAMES})
    engine = Engine(served)
    server = Server(("127.0.0.1", 0), engine, Limits(body_bytes=4096, max_tokens=32))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    engine.close()


@pytest.fixture
def ask(serving: Any) -> Callable[..., tuple[int, Any]]:
    """Sends a request; gives status and body."""
    port = serving.server_address[1]

    def send(path: str, content: Any = None, method: str | None = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        body = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
        method = method or ("GET" if content is None else "POST")
        connection.request(method, path, body, {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if response.headers.get_content_type() == "application/json" else text

    return send


def chat(model: str, text: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": MAX_TOKENS, **fields}


@pytest.fixture(scope="module")
def expected(folders: Path) -> dict[tuple[str, str], str]:
    """What each model answers alone, loaded by itself, without a server."""
    from ftcli.exporting.open_target import open_target
    from ftcli.models.generate import generate

    answers = {}
    texts = [f"question {number}" for number in range(5)]
    for name in ("base", *NAMES):
        loaded = open_target(str(folders / name))
        prompts = [loaded.tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True) for text in texts]
        for text, answer in zip(texts, generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=MAX_TOKENS), strict=True):
            answers[name, text] = answer.text
    return answers


def test_the_models_are_listed(ask: Any) -> None:
    status, body = ask("/v1/models")
    assert status == 200
    assert [model["id"] for model in body["data"]] == ["base", *NAMES]
    assert ask("/health")[0] == 200


def test_200_requests_at_once_get_their_own_adapters_answers(ask: Any, expected: dict[tuple[str, str], str]) -> None:
    asked = [(NAMES[number % 3], f"question {number % 5}") for number in range(200)]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda pair: ask("/v1/chat/completions", chat(*pair)), asked))
    assert [status for status, _ in answers] == [200] * 200
    assert [body["choices"][0]["message"]["content"] for _, body in answers] == [expected[pair] for pair in asked]
    assert {body["model"] for _, body in answers} == set(NAMES)
    assert len({expected[name, "question 0"] for name in ("base", *NAMES)}) == 4


def test_the_base_answers_as_without_adapters(ask: Any, expected: dict[tuple[str, str], str]) -> None:
    _, body = ask("/v1/chat/completions", chat("base", "question 1"))
    assert body["choices"][0]["message"]["content"] == expected["base", "question 1"]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_is_the_whole_answer_in_pieces(ask: Any, expected: dict[tuple[str, str], str]) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    status, text = ask("/v1/chat/completions", chat("green", "question 2", **options))
    assert status == 200
    found = events(text)
    deltas = [event["choices"][0]["delta"] for event in found if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == expected["green", "question 2"]
    assert found[-1]["usage"]["prompt_tokens"] > 0


def test_a_text_is_continued_without_the_template(ask: Any) -> None:
    request = {"model": "red", "prompt": "Once", "max_tokens": MAX_TOKENS}
    status, body = ask("/v1/completions", request)
    assert status == 200
    assert body["object"] == "text_completion"
    _, text = ask("/v1/completions", {**request, "stream": True})
    assert "".join(event["choices"][0]["text"] for event in events(text)) == body["choices"][0]["text"]


def test_a_stop_text_ends_the_answer(ask: Any, expected: dict[tuple[str, str], str]) -> None:
    whole = expected["blue", "question 3"]
    stop = whole[2:4]
    _, body = ask("/v1/chat/completions", chat("blue", "question 3", stop=[stop]))
    assert body["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": whole[: whole.index(stop)]},
        "finish_reason": "stop",
    }
    _, text = ask("/v1/chat/completions", chat("blue", "question 3", stop=stop, stream=True))
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events(text)]
    assert "".join(pieces) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("content", "status", "field"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"\xff\xfe", 400, None),
        ({"model": "red"}, 400, "messages"),
        (chat("red", max_tokens=0), 400, "max_tokens"),
        (chat("nobody"), 404, "model"),
        (chat("red", max_tokens=33), 400, "max_tokens"),
        (chat("red", max_tokens="8"), 400, "max_tokens"),
        (chat("red", max_tokens=True), 400, "max_tokens"),
        (chat("red", temperature=-1), 400, "temperature"),
        (chat("red", n=2), 400, "n"),
        (chat("red", tools=[{"type": "function"}]), 400, "tools"),
        (chat("red", temprature=1), 400, "temprature"),
        (chat("red", stop=["a"] * 5), 400, "stop"),
        (chat("red", stream="yes"), 400, "stream"),
        (chat("red", "long " * 30), 400, "messages"),
        ({**chat("red"), "messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.tool_call_id"),
        ({**chat("red"), "messages": [{"role": "function", "content": "x"}]}, 400, "messages.0.role"),
        ({**chat("red"), "messages": [{"role": "user", "content": "x", "name": "Ada"}]}, 400, "messages.0.name"),
        (chat("red", "half \ud800"), 400, "messages.0.content"),
        (chat("\ud800"), 400, "model"),
        (chat("red", **{"\udfff": 1}), 400, "\\udfff"),
        (b'{"model": "red", "messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', 400, "messages.0.content"),
        ({**chat("red"), "messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
        ({**chat("red"), "messages": "Hi"}, 400, "messages"),
    ],
)
def test_a_malformed_request_is_refused_with_its_field(content: Any, status: int, field: str | None, ask: Any) -> None:
    found, body = ask("/v1/chat/completions", content)
    assert (found, body["error"]["param"]) == (status, field)
    assert body["error"]["message"]


def test_an_oversize_body_is_refused(ask: Any) -> None:
    status, body = ask("/v1/chat/completions", chat("red", "x" * 5000))
    assert (status, body["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("fields", [{"temperature": 2}, {"temperature": 1e-300}, {"temperature": 1, "top_p": 0}, {"seed": -(2**63)}])
@pytest.mark.parametrize("stream", [False, True])
def test_every_number_in_range_is_served(fields: dict[str, Any], stream: bool, ask: Any) -> None:
    status, body = ask("/v1/chat/completions", chat("red", stream=stream, **fields))
    assert status == 200
    assert "error" not in body


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "seed": 2}])
@pytest.mark.parametrize("asked", [{"max_tokens": 20}, {"max_tokens": 32, "prompt": "x" * 50}, {"max_tokens": 20, "stop": "CUT"}])
def test_a_stream_counts_and_ends_like_the_whole_answer(asked: dict[str, Any], sampling: dict[str, Any], ask: Any) -> None:
    for model in ("base", *NAMES):
        request = {"model": model, "prompt": "Once", **asked, **sampling}
        if "stop" in asked:
            request["stop"] = ask("/v1/completions", {**request, "stop": None})[1]["choices"][0]["text"][3:5]
        _, whole = ask("/v1/completions", request)
        _, text = ask("/v1/completions", {**request, "stream": True, "stream_options": {"include_usage": True}})
        *pieces, last = events(text)
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole["choices"][0]["text"]
        assert pieces[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert last["usage"] == whole["usage"]
        assert last["usage"]["completion_tokens"] <= asked["max_tokens"]


def test_usage_counts_the_tokens_that_were_made(folders: Path, ask: Any) -> None:
    """Half a character is a token of its own, and another text when it is encoded again."""
    from ftcli.exporting.open_target import open_target
    from ftcli.models.generate import Sampling, generate

    loaded = open_target(str(folders / "base"))
    options: dict[str, Any] = {"temperature": 1.5, "seed": 3}
    for prompt in ("Once", "\u00e9", "12"):
        expected = generate(loaded.model, loaded.tokenizer, [prompt], max_new_tokens=20, sampling=Sampling(**options))[0]
        request = {"model": "base", "prompt": prompt, "max_tokens": 20, **options}
        _, text = ask("/v1/completions", {**request, "stream": True, "stream_options": {"include_usage": True}})
        assert events(text)[-1]["usage"]["completion_tokens"] == len(expected.tokens)
        assert len(loaded.tokenizer.encode(expected.text)[0]) != len(expected.tokens)


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, 1.0, 1e-300, 10**400, 2**63, "", "x", "\ud800", "a\0b", "\u00e9" * 300),
    *([], {}, [[]], [{}], ["a"], [1], ["\ud800"], {"type": "text", "text": "a"}, [{"type": "image_url"}], {"a": {"b": [1]}}),
)


def mutated(random: Random, request: dict[str, Any]) -> bytes:
    """The request with one to three values replaced, removed or added, and sometimes with other bytes."""
    request = json.loads(json.dumps(request))
    for _ in range(random.choice((1, 1, 2, 3))):
        parents = [request, *(message for message in request.get("messages") or [] if isinstance(message, dict))]
        parent = random.choice([parent for parent in parents if parent] or [request])
        key = random.choice([*parent, "name", "tool_calls", "zzz"])
        value = random.choice(ODD)
        parent[key] = [value] if random.random() < 0.1 else value
        if not isinstance(request.get("messages"), list):
            break
    body = bytearray(json.dumps(request).encode())
    if random.random() < 0.2:
        body[random.randrange(len(body))] = random.randrange(256)
    return bytes(body)


def test_300_broken_requests_are_answered_or_refused_and_never_fail(ask: Any) -> None:
    random = Random(0)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]
    conversation = {"messages": messages, "max_tokens": 2, "temperature": 0.7}
    valid = [
        ("/v1/chat/completions", {"model": "red", **conversation, "stop": ["q"], "n": 1, "top_p": 0.9, "seed": 1}),
        ("/v1/chat/completions", {"model": "base", **conversation, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"model": "blue", "prompt": "Once", "max_tokens": 2, "temperature": 0}),
        ("/v1/completions", {"model": "base", "prompt": ["Once"], "max_tokens": 2, "temperature": 2, "top_p": 1, "stream": True}),
    ]
    statuses = []
    for _ in range(300):
        path, request = random.choice(valid)
        body = mutated(random, request)
        status, answer = ask(path, body)
        assert status == 200 or 400 <= status < 500, (body, answer)
        assert "model_failed" not in str(answer), (body, answer)
        statuses.append(status)
    assert {200, 400} <= set(statuses)


def test_a_content_length_without_end_is_refused(serving: Any) -> None:
    for header in ("Content-Length: " + "9" * 5000, "Content-Length: 2\r\nTransfer-Encoding: chunked"):
        with socket.create_connection(serving.server_address[:2], timeout=30) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
            connection.shutdown(socket.SHUT_WR)
            received = connection.recv(4096)
        assert received.split(b"\r\n")[0].split()[1] in (b"411", b"413")


def test_a_failure_of_the_model_is_answered_with_500_and_its_traceback_is_said(folders: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from ftcli.serving.engine import Engine
    from ftcli.serving.models import serve_models
    from ftcli.serving.protocol import read_request
    from ftcli.serving.refusal import ApiError

    def fail(name: str) -> Any:
        raise RuntimeError("the weights are gone")

    served = serve_models(str(folders / "base"), {})
    engine = Engine(served)
    engine.served = replace(served, use=fail)
    made = engine.submit(read_request(json.dumps(chat("base")).encode(), is_chat=True, token_limit=32)).pieces.get(timeout=60)
    engine.close()
    assert isinstance(made, ApiError)
    assert made.status == 500
    said = capfd.readouterr().err
    assert "RuntimeError: the weights are gone" in said
    assert "Traceback" in said


def test_other_paths_types_and_hosts_are_refused(ask: Any) -> None:
    assert ask("/v1/embeddings", {"model": "red"})[0] == 404
    assert ask("/nothing")[0] == 404
    assert ask("/v1/models", method="PUT")[0] == 501
    assert ask("/v1/chat/completions", json.dumps(chat("red")).encode(), Content_Type="text/plain")[0] == 415
    assert ask("/v1/chat/completions", chat("red"), Host="example.org")[0] == 403


def test_the_body_of_a_get_is_not_taken_for_the_next_request(serving: Any) -> None:
    for header in (b"Content-Length: 30\r\n\r\n" + b"x" * 30, b"Transfer-Encoding: chunked\r\n\r\n3\r\nxyz\r\n0\r\n\r\n"):
        with socket.create_connection(serving.server_address[:2], timeout=30) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: LOCALHOST\r\n" + header)
            received = b""
            while piece := connection.recv(4096):
                received += piece
        assert received.startswith(b"HTTP/1.1 200 OK")
        assert received.count(b"HTTP/1.1") == 1
        assert b"Connection: close" in received


def test_a_key_that_is_given_twice_is_refused(ask: Any) -> None:
    status, body = ask("/v1/completions", b'{"model": "red", "prompt": "x", "model": "blue"}')
    assert (status, body["error"]["param"]) == (400, "model")


def test_garbage_and_a_missing_length_are_answered_with_4xx(serving: Any) -> None:
    for sent, status in ((b"nonsense\r\n\r\n", b"400"), (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", b"411")):
        with socket.create_connection(serving.server_address[:2], timeout=30) as connection:
            connection.sendall(sent)
            received = b""
            while piece := connection.recv(4096):
                received += piece
        assert status in received.split(b"\r\n")[0]
        assert b'"error"' in received


def test_a_reader_that_goes_away_stops_its_stream_and_nothing_else(serving: Any, ask: Any) -> None:
    body = json.dumps(chat("red", stream=True, max_tokens=32)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(5):
        with socket.create_connection(serving.server_address[:2], timeout=30) as connection:
            connection.sendall(head.encode() + body)
    assert ask("/v1/chat/completions", chat("green"))[0] == 200


def test_a_client_that_goes_away_from_a_whole_answer_is_waited_for_no_longer(
    serving: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer in hand ends at the next token, and those in the line are never begun."""
    engine, calls, gone = serving.engine, [0], threading.Event()
    model = next(module for module in engine.served.use("base").modules() if hasattr(module, "lm_head"))
    cancel, cancelled = engine.cancel, []

    def cancel_noted(job: Any) -> None:
        cancel(job)
        cancelled.append(job)
        if len(cancelled) == 4:
            gone.set()

    monkeypatch.setattr(engine, "cancel", cancel_noted)
    body = {"model": "base", "prompt": "Once", "max_tokens": 32, "seed": 3, "temperature": 1.5}

    def count(*_: object) -> None:
        calls[0] += 1
        if calls[0] == 3 and not gone.is_set():
            gone.wait(30)

    gone.set()
    handle = model.register_forward_pre_hook(count)
    ask("/v1/completions", body)
    num_whole, calls[0] = calls[0], 0
    assert num_whole > 6
    gone.clear()
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    connections = [socket.create_connection(serving.server_address[:2], timeout=30)]
    connections[0].sendall(head.encode() + text)
    while calls[0] < 3:
        time.sleep(0.01)
    connections += [socket.create_connection(serving.server_address[:2], timeout=30) for _ in range(3)]
    for connection in connections[1:]:
        connection.sendall(head.encode() + text)
    while engine.num_waiting < 3:
        time.sleep(0.01)
    for connection in connections[1:]:
        connection.close()
    for _ in range(500):
        if not engine.num_waiting:
            break
        time.sleep(0.01)
    assert engine.num_waiting == 0
    connections[0].close()
    assert ask("/v1/completions", {**body, "max_tokens": 1})[0] == 200
    handle.remove()
    assert gone.is_set()
    assert calls[0] <= 4 + 1  # the token at which it was, perhaps one more, and the one that was asked for since


def test_a_base_without_a_template_says_what_it_can_do_and_can_be_given_one(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftcli.serving.engine import Engine
    from ftcli.serving.models import serve_models
    from ftcli.serving.protocol import read_request
    from ftcli.serving.refusal import ApiError

    bare = folders / "bare"
    shutil.copytree(folders / "base", bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "chat_template"}))
    request = read_request(json.dumps(chat("bare")).encode(), is_chat=True, token_limit=32)
    engine = Engine(serve_models(str(bare), {}))
    with pytest.raises(ApiError, match=r"POST /v1/completions.*`ftcli serve --template \w+` gives it a template") as error:
        engine.submit(request)
    engine.close()
    assert (error.value.status, error.value.field) == (400, "messages")
    engine = Engine(serve_models(str(bare), {}, template="plain"))
    assert not isinstance(engine.submit(request).pieces.get(timeout=60), ApiError)
    engine.close()
    monkeypatch.setattr("ftcli.cli.serve._run", lambda server, engine: (server.server_close(), engine.close()))
    assert run(["serve", str(bare), "--port", "0"]) == 0
    assert "note: `bare` has no chat template, and takes no conversations" in capsys.readouterr().out
    assert run(["serve", str(bare), "--port", "0", "--template", "plain"]) == 0
    assert "no chat template" not in capsys.readouterr().out
    assert run(["serve", str(folders / "base"), "--port", "0", "--template", "plain"]) == 2
    assert "all of these have one" in capsys.readouterr().err


def test_a_full_line_is_answered_with_429(folders: Path) -> None:
    from ftcli.serving.engine import Engine
    from ftcli.serving.models import serve_models
    from ftcli.serving.protocol import read_request
    from ftcli.serving.refusal import ApiError

    served = serve_models(str(folders / "red"), {})
    release = threading.Event()
    held = replace(served, use=lambda name: (release.wait(), served.use(name))[1])
    release.set()
    engine = Engine(held, max_waiting=3)
    release.clear()
    request = read_request(json.dumps(chat("red")).encode(), is_chat=True, token_limit=32)
    jobs = [engine.submit(request)]
    while engine.num_waiting:  # the first is taken out of the line, and held
        time.sleep(0.01)
    jobs += [engine.submit(request) for _ in range(3)]
    with pytest.raises(ApiError, match="3 requests are waiting") as error:
        engine.submit(request)
    assert error.value.status == 429
    release.set()
    assert not any(isinstance(job.pieces.get(timeout=60), ApiError) for job in jobs)
    engine.close()
    with pytest.raises(ApiError, match="stopping"):
        engine.submit(request)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "red"], "is not NAME=DIR"),
        (["--adapter", "a=x", "--adapter", "a=y"], "is given twice"),
        (["--adapter", "base=x"], "is the name of the base"),
        (["--adapter", "a=nowhere"], "nowhere"),
        (["--host", "203.0.113.1"], "cannot listen at 203.0.113.1"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], message: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(folders / "base"), "--port", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_serves_until_it_is_told_to_stop(folders: Path) -> None:
    command = [sys.executable, "-m", "ftcli", "serve", str(folders / "red"), "--port", "0", "--host", "0.0.0.0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "listening at" in line:
            break
    assert "warning: 0.0.0.0 can be reached from other machines" in said
    assert "models: base, red" in said
    port = int(said.rpartition("/v1")[0].rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(chat("red")), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    process.stdout.close()
