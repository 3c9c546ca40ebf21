"""`ftcli serve`: every request gets its own adapter's answer, or a 4xx that says why not."""

from __future__ import annotations

import http.client
import json
import os
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
        ({**chat("red"), "messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
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


def test_other_paths_types_and_hosts_are_refused(ask: Any) -> None:
    assert ask("/v1/embeddings", {"model": "red"})[0] == 404
    assert ask("/nothing")[0] == 404
    assert ask("/v1/models", method="PUT")[0] == 501
    assert ask("/v1/chat/completions", json.dumps(chat("red")).encode(), Content_Type="text/plain")[0] == 415
    assert ask("/v1/chat/completions", chat("red"), Host="example.org")[0] == 403


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


def test_a_full_line_is_answered_with_429(folders: Path) -> None:
    from ftcli.serving.engine import Engine
    from ftcli.serving.models import serve_models
    from ftcli.serving.protocol import ApiError, read_request

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
    command = [sys.executable, "-m", "ftcli.cli.main", "serve", str(folders / "red"), "--port", "0", "--host", "0.0.0.0"]
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
