"""The HTTP side, on the standard library's threading server: a thread a connection, which waits while one thread computes.

Nothing here is faster with an event loop: the model is busy, and the connections wait. In return there is no package to install.
"""

from __future__ import annotations

import ipaddress
import json
import queue
import select
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import MSG_PEEK
from typing import TYPE_CHECKING, Any

from ftcli.serving.engine import Engine, Job, Result
from ftcli.serving.protocol import AnswerRequest, read_request
from ftcli.serving.refusal import ApiError

if TYPE_CHECKING:
    from socket import socket

POST_PATHS = {"/v1/chat/completions": True, "/v1/completions": False}
_MOST_DIGITS = 15  # of a Content-Length
_LOOK_SECONDS = 0.25  # how often a connection that waits is looked at
_DRAINED = 8  # so many times the allowed size is read and thrown away, so that the refusal arrives


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may be."""

    body_bytes: int = 2**20
    max_tokens: int = 1024
    connections: int = 512
    """Open at once."""
    idle_seconds: float = 60.0
    """A connection that says nothing for so long is closed."""


class Server(ThreadingHTTPServer):
    """Answers requests until `shutdown`."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self.is_local = is_loopback(address[0])
        self._places = threading.BoundedSemaphore(limits.connections)
        super().__init__(address, Handler)

    def process_request(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        assert not isinstance(request, tuple)
        body = json.dumps(ApiError(503, "too many connections", code="too_many_connections").to_json()).encode()
        head = ["HTTP/1.1 503 Service Unavailable", "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"]
        with suppress(OSError):  # it may have gone already
            request.sendall("\r\n".join([*head, "", ""]).encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the server."""
        import sys

        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def is_loopback(host: str) -> bool:
    """Can only this machine reach `host`?"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "ftcli"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.limits.idle_seconds)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what is asked is nobody's business."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, as JSON, too."""
        self.close_connection = True
        self.request_version = self.protocol_version  # what cannot be read counts as HTTP/0.9, which has no status
        self._send(ApiError(code, (message or "bad request").lower(), code="bad_request"))

    def do_GET(self) -> None:
        try:
            self._check_host()
            if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
                self.close_connection = True  # what nobody reads is not to be taken for the next request
            if self.path == "/health":
                self._send_json(200, {"status": "ok"})
            elif self.path == "/v1/models":
                data = [{"id": name, "object": "model", "created": 0, "owned_by": "ftcli"} for name in self.server.engine.served.names]
                self._send_json(200, {"object": "list", "data": data})
            else:
                raise self._no_path()
        except ApiError as error:
            self._send(error)

    def do_POST(self) -> None:
        try:
            self._check_host()
            body = self._body()
            is_chat = POST_PATHS.get(self.path)
            if is_chat is None:
                raise self._no_path()
            request = read_request(body, is_chat=is_chat, token_limit=self.server.limits.max_tokens)
            job = self.server.engine.submit(request)
        except ApiError as error:
            self._send(error)
            return
        if request.stream:
            self._answer_in_pieces(job)
        else:
            self._answer_whole(job)

    def _check_host(self) -> None:
        """A web page can make a browser ask a name that leads here; on loopback, only loopback's names are answered."""
        host = self.headers.get("Host", "")
        name = (host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host).lower()
        if self.server.is_local and name and not is_loopback(name.strip("[]")):
            self.close_connection = True
            raise ApiError(403, f"the host `{name}` is not this machine's own", code="wrong_host")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None or not length.isdecimal() or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise ApiError(411, "the request has no Content-Length, or is sent in chunks", code="length_required")
        limit = self.server.limits.body_bytes
        if len(length) > _MOST_DIGITS or int(length) > limit:
            self.close_connection = True
            self._drain(_DRAINED * limit if len(length) > _MOST_DIGITS else min(int(length), _DRAINED * limit))
            raise ApiError(413, f"the body has more than the {limit} bytes that are allowed", code="body_too_large")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError as error:
            self.close_connection = True
            raise ApiError(408, "the body did not arrive", code="timeout") from error
        if len(body) < int(length):
            self.close_connection = True
            raise ApiError(400, "the body ends before its length", code="invalid_body")
        if self.headers.get_content_type() != "application/json":
            raise ApiError(415, "the body is not of type application/json", code="wrong_type")
        return body

    def _drain(self, num_bytes: int) -> None:
        with suppress(TimeoutError):
            while num_bytes > 0 and (read := self.rfile.read1(min(num_bytes, 2**16))):
                num_bytes -= len(read)

    def _made(self, job: Job) -> str | Result | ApiError:
        """What is made next of an answer.

        Raises:
            ConnectionError: the client has gone away, and nobody waits for it.
        """
        while True:
            try:
                return job.pieces.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if self._is_gone():
                    raise ConnectionAbortedError from None

    def _is_gone(self) -> bool:
        """Has the client closed the connection?"""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(1, MSG_PEEK)
        except OSError:
            return True

    def _answer_whole(self, job: Job) -> None:
        try:
            made = self._made(job)
        except OSError:
            self.server.engine.cancel(job)
            self.close_connection = True
            return
        if isinstance(made, Result):
            self._send_json(200, answer_body(job.request, made))
        elif isinstance(made, ApiError):
            self._send(made)

    def _answer_in_pieces(self, job: Job) -> None:
        """Server-sent events; an error after the beginning is an event, too."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        writer = StreamWriter(job.request)
        try:
            for event in writer.begin():
                self._event(event)
            while isinstance(made := self._made(job), str):
                self._event(writer.piece(made))
            if isinstance(made, ApiError):
                self._event(made.to_json())
            else:
                for event in writer.end(made):
                    self._event(event)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.engine.cancel(job)  # the reader has gone: nobody waits for the rest

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + _as_json(content) + b"\n\n")
        self.wfile.flush()

    def _no_path(self) -> ApiError:
        paths = ", ".join(("GET /v1/models", *(f"POST {path}" for path in POST_PATHS)))
        return ApiError(404, f"there is no `{self.command} {self.path[:100]}` ({paths})", code="not_found")

    def _send(self, error: ApiError) -> None:
        self._send_json(error.status, error.to_json())

    def _send_json(self, status: int, content: dict[str, Any]) -> None:
        body = _as_json(content)
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _as_json(content: dict[str, Any]) -> bytes:
    """In UTF-8; half of a surrogate pair, which a template could write into its refusal, as JSON escapes it."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")


def answer_body(request: AnswerRequest, result: Result) -> dict[str, Any]:
    """A whole answer, as OpenAI's clients read it."""
    reason = "stop" if result.stopped else "length"
    if request.is_chat:
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": result.text}, "finish_reason": reason}
    else:
        choice = {"index": 0, "text": result.text, "logprobs": None, "finish_reason": reason}
    return {**_head(request, is_chunk=False), "choices": [choice], "usage": _usage(result)}


class StreamWriter:
    """The events of one streamed answer."""

    def __init__(self, request: AnswerRequest) -> None:
        self._request = request
        self._fields = _head(request, is_chunk=True)

    def begin(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})] if self._request.is_chat else []

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text}) if self._request.is_chat else self._text(text, None)

    def end(self, result: Result) -> list[dict[str, Any]]:
        reason = "stop" if result.stopped else "length"
        events = [self._chunk({}, reason) if self._request.is_chat else self._text("", reason)]
        return [*events, {**self._fields, "choices": [], "usage": _usage(result)}] if self._request.with_usage else events

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        return {**self._fields, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    def _text(self, text: str, reason: str | None) -> dict[str, Any]:
        return {**self._fields, "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}


def _head(request: AnswerRequest, *, is_chunk: bool) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if is_chunk else "chat.completion") if request.is_chat else "text_completion"
    prefix = "chatcmpl" if request.is_chat else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": request.model}


def _usage(result: Result) -> dict[str, int]:
    return {
        "prompt_tokens": result.num_prompt_tokens,
        "completion_tokens": result.num_tokens,
        "total_tokens": result.num_prompt_tokens + result.num_tokens,
    }
