"""The one thread that computes: requests wait in a line, and those that can be answered together are.

Greedy requests to the same model, of the same length, are answered as one batch; a stream is answered alone, token by token. The line
has an end: what comes beyond it is refused at once, so that no one waits for an answer that does not come.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftcli.errors import FtcliError
from ftcli.models.generate import Answer, Piece, PieceDecoder, Sampling, context_length, generate, prompt_ids, stream_pieces
from ftcli.serving.messages import check_all_is_read
from ftcli.serving.models import no_conversations
from ftcli.serving.protocol import AnswerRequest
from ftcli.serving.refusal import ApiError

if TYPE_CHECKING:
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.serving.models import Served

BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    """That were made for it: up to the one that ended it, or that completed a stop text."""
    stopped: bool
    """The model, or a stop text, ended it."""


@dataclass(eq=False)
class Job:
    """A request in the line, with its prompt as text."""

    request: AnswerRequest
    prompt: str
    num_prompt_tokens: int
    pieces: queue.SimpleQueue[str | Result | ApiError] = field(default_factory=queue.SimpleQueue)
    """What is made: text of a stream, and at the end the result or why there is none."""
    is_cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def together(self) -> tuple[Any, ...] | None:
        """Jobs with the same key are answered in one batch; None for alone."""
        asked = self.request
        return None if asked.stream or asked.temperature > 0 else (asked.model, asked.max_tokens)


class Engine:
    """Answers jobs in a thread of its own.

    Args:
        max_waiting: jobs in the line, beyond which new ones are refused.
    """

    def __init__(self, served: Served, *, max_waiting: int = 256) -> None:
        self.served = served
        self._max_waiting = max_waiting
        self._contexts = {name: context_length(served.use(name)) for name in served.names}
        """A soft prompt takes of its model's context, and no other's."""
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="ftcli-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests in the line."""
        return len(self._waiting)

    def submit(self, request: AnswerRequest) -> Job:
        """Put a request in the line.

        Raises:
            ApiError: no such model, a prompt that cannot be answered, or a line that is full.
        """
        job = self._job(request)
        with self._changed:
            if self._is_closed:
                raise ApiError(503, "the server is stopping", code="stopping")
            if len(self._waiting) >= self._max_waiting:
                raise ApiError(429, f"{self._max_waiting} requests are waiting; try again later", code="too_many_requests")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for the job any more: it leaves the line, or is not gone on with."""
        job.is_cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """End the thread after what it is at; what waits is refused."""
        with self._changed:
            self._is_closed = True
            for job in self._waiting:
                job.pieces.put(ApiError(503, "the server is stopping", code="stopping"))
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout=30)

    def _job(self, request: AnswerRequest) -> Job:
        tokenizer = self.served.tokenizers.get(request.model)
        if tokenizer is None:
            known = ", ".join(self.served.names)
            raise ApiError(404, f"there is no model `{request.model[:100]}` (models: {known})", code="model_not_found", field="model")
        where = "messages" if request.is_chat else "prompt"
        if request.is_chat and tokenizer.chat_template is None:
            raise ApiError(400, no_conversations(request.model, tokenizer), code="no_chat_template", field=where)
        try:
            prompt = request.prompt if request.messages is None else _conversation(tokenizer, request.messages)
            num_tokens = len(prompt_ids(tokenizer, prompt))
        except FtcliError as error:
            raise ApiError(400, str(error), code="invalid_prompt", field=where) from error
        context = self._contexts[request.model]
        if context is not None and num_tokens >= context:
            what = f"`{where}` has {num_tokens} tokens, which leave no room for an answer in a context of {context}"
            raise ApiError(400, what, code="context_length_exceeded", field=where)
        return Job(request, prompt, num_tokens)

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            jobs = [job for job in jobs if not job.is_cancelled.is_set()]
            if not jobs:
                continue
            try:
                self._answer(jobs)
            except Exception as error:
                # whatever went wrong with these must not end the thread that answers all others
                traceback.print_exception(error)
                for job in jobs:
                    job.pieces.put(ApiError(500, f"the model failed: {type(error).__name__}: {error}", code="model_failed"))

    def _next(self) -> list[Job] | None:
        """The first job in the line, with those that can be answered together with it; None at the end."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            if not self._waiting:
                return None
            first = self._waiting.popleft()
            if first.together is None:
                return [first]
            others = [job for job in self._waiting if job.together == first.together][: BATCH_SIZE - 1]
            for job in others:
                self._waiting.remove(job)
            return [first, *others]

    def _answer(self, jobs: list[Job]) -> None:
        first = jobs[0].request
        tokenizer = self.served.tokenizers[first.model]
        module = self.served.use(first.model)
        if first.stream:
            self._stream(jobs[0], module)
            return
        sampling = Sampling(first.temperature, first.top_p, seed=first.seed)
        prompts = [job.prompt for job in jobs]
        answers = generate(
            module,
            tokenizer,
            prompts,
            max_new_tokens=first.max_tokens,
            batch_size=BATCH_SIZE,
            sampling=sampling,
            is_wanted=lambda: not all(job.is_cancelled.is_set() for job in jobs),
        )
        for job, answer in zip(jobs, answers, strict=True):
            written = Written(job.request.stop)
            for piece in _pieces(tokenizer, job, answer):
                written.add(piece)
                if written.is_cut:
                    break
            job.pieces.put(written.result(job))

    def _stream(self, job: Job, module: Any) -> None:
        asked, tokenizer = job.request, self.served.tokenizers[job.request.model]
        sampling = Sampling(asked.temperature, asked.top_p, seed=asked.seed)
        written, told = Written(asked.stop), 0
        held = max((len(text) for text in asked.stop), default=1) - 1
        with closing(stream_pieces(module, tokenizer, job.prompt, max_new_tokens=asked.max_tokens, sampling=sampling)) as pieces:
            for piece in pieces:
                written.add(piece)
                # the end of what is written may be the beginning of a stop text
                certain = len(written.text) if written.is_cut else max(told, len(written.text) - held)
                if certain > told:
                    job.pieces.put(written.text[told:certain])
                    told = certain
                if written.is_cut or job.is_cancelled.is_set():
                    break
        if len(written.text) > told:
            job.pieces.put(written.text[told:])
        job.pieces.put(written.result(job))


@dataclass
class Written:
    """An answer as far as it is written, up to the first stop text."""

    stops: tuple[str, ...]
    text: str = ""
    num_tokens: int = 0
    is_cut: bool = False
    """A stop text was written; what comes after it is nobody's."""
    is_ended: bool = False
    """By the model."""

    def add(self, piece: Piece) -> None:
        """Go on with the next piece."""
        self.text, self.is_cut = cut_at_stop(self.text + piece.text, self.stops)
        self.num_tokens, self.is_ended = piece.num_tokens, piece.stopped

    def result(self, job: Job) -> Result:
        return Result(self.text, job.num_prompt_tokens, self.num_tokens, self.is_cut or self.is_ended)


def _pieces(tokenizer: Tokenizer, job: Job, answer: Answer) -> Iterator[Piece]:
    """An answer that was made in a batch, as a stream would have told it: so a stop text counts the same tokens."""
    if any(stop in answer.text for stop in job.request.stop):
        pieces = PieceDecoder(tokenizer, prompt_ids(tokenizer, job.prompt))
        yield from (Piece(pieces.add(token), number) for number, token in enumerate(answer.tokens, start=1))
        yield Piece(pieces.rest(), len(answer.tokens), answer.stopped)
    else:
        yield Piece(answer.text, len(answer.tokens), answer.stopped)


def _conversation(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> str:
    """The prompt of a conversation.

    Raises:
        ApiError: the chat template leaves something of it out.
        FtcliError: there is no template, or it refuses the conversation.
    """

    def render(given: Sequence[Mapping[str, Any]]) -> str:
        return tokenizer.render(given, add_generation_prompt=True)

    text = render(messages)
    check_all_is_read(messages, text, render)
    return text


def cut_at_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """(the text up to the first stop text, is there one).

    Example:
        >>> cut_at_stop("one. two", (". ", "tw"))
        ('one', True)
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
