"""Answers to prompts: many at once in batches, or one as a stream of text.

A batch is left-padded and made of prompts of similar length, so that little padding is computed and an answer does not depend on
what it was batched with. Decoding is plain: greedy unless asked otherwise, and whatever a model's generation_config.json says
about sampling or penalties is left out, so that a score depends on the weights alone.
A soft prompt stands right before the text, after the padding; the members of an ensemble answer as rows of one batch, and vote.
Legend: ``B`` rows in a batch, ``L`` tokens of its longest prompt, ``N`` new tokens.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from ftcli.errors import Problem, RequestError
from ftcli.models.vote import vote

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import GenerationConfig, PreTrainedModel

    from ftcli.models.prompted import LogProbRecorder
    from ftcli.models.tokenizer import Tokenizer

BATCH_SIZE = 64
MIN_TEMPERATURE = 1e-6  # below it the rounding of float32 logits alone would choose, and then they overflow: the likeliest is taken
INCOMPLETE = "�"


class Progress(Protocol):
    """Is told how far a piece of work is."""

    def update(self, done: int, total: int, what: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0, and what is nearly 0, takes the likeliest token each time."""
    top_p: float | None = None
    """Samples from the likeliest tokens that hold this share of the probability."""
    top_k: int | None = None
    """Samples from so many of the likeliest tokens."""
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote after one prompt."""

    text: str
    """Without the token that ended it."""
    tokens: tuple[int, ...]
    """Its token ids, without the one that ended it."""
    stopped: bool
    """Whether the model ended it, by a token or a stop text; False where it was cut at `max_new_tokens` or the end of the context."""
    log_prob: float | None = None
    """In nats, summed over its tokens and the one that ended it; only an ensemble, which votes, keeps it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer that is made token by token."""

    text: str
    num_tokens: int
    """Of the answer up to here, without the one that ended it."""
    stopped: bool = False
    """Whether the model has ended the answer; only the last piece can say so."""


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> list[Answer]:
    """One answer per prompt, in the order of the prompts; where the model is an ensemble, the one its members vote for.

    Args:
        model: a transformers model, or a PEFT model around one; left in the attention and the mode it was in.
        prompts: text as it is to be continued, with whatever a chat template adds.
        sampling: the same one, prompts and batch size give the same answers.
        stop: an answer ends before the first of these texts in it; a batch in which every answer has ended is not gone on with.
        is_wanted: asked after every token; once it says no, answers end where they are.

    Raises:
        RequestError: a prompt is empty, or leaves no room for an answer in the model's context.
    """
    options: dict[str, Any] = {"sampling": sampling, "stop": stop, "batch_size": batch_size, "progress": progress, "is_wanted": is_wanted}
    groups = member_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **options)
    return [elected(group) for group in groups]


def elected(group: Sequence[Answer]) -> Answer:
    """The answer that the members of an ensemble vote for; of a group of one, itself."""
    return group[0] if len(group) == 1 else group[vote([answer.text for answer in group], [answer.log_prob or 0.0 for answer in group])]


def member_answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> list[list[Answer]]:
    """The answers of every member of an ensemble to each prompt, in one batch; of any other model, its one answer.

    The arguments are those of `generate`; `batch_size` counts rows, one for every member.
    """
    import torch

    from ftcli.layout.virtual import soft_prompt_members
    from ftcli.models.prompted import LogProbRecorder

    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    room = [_room_for_answer(model, ids, max_new_tokens, f"prompt {index + 1}") for index, ids in enumerate(encoded)]
    num_members = max(1, len(soft_prompt_members(model)))
    answers: list[list[Answer]] = [[] for _ in prompts]
    done = 0
    with ordinary_attention(model), torch.inference_mode(), torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(sampling.seed)
        lengths = [len(ids) for ids in encoded]
        is_strict = _padding_matters(model, max((n + r for n, r in zip(lengths, room, strict=True)), default=0))
        for batch in _batches(lengths, room, max(1, batch_size // num_members), of_one_length=is_strict):
            settings = _generation_config(tokenizer, room[batch[0]], sampling)
            recorder = LogProbRecorder() if num_members > 1 else None
            texts = _StopTexts(tokenizer, stop) if stop else None
            asked = [_Unwanted(is_wanted), *([] if texts is None else [texts])]
            options: dict[str, Any] = {"stopping_criteria": asked, **({} if recorder is None else {"logits_processor": [recorder]})}
            rows = _continue(model, [encoded[index] for index in batch], settings, **options)
            for position, padded in enumerate(rows):
                index = batch[position // num_members]
                new = padded if texts is None else padded[: texts.ends.get(position)]
                answer = _answer(tokenizer, encoded[index], new, stop)
                answers[index].append(answer if recorder is None else replace(answer, log_prob=_log_prob(recorder, position, answer, new)))
            done += len(batch)
            if progress is not None:
                progress.update(done, len(prompts), "generating answers")
    return answers


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, after the beginning-of-sequence token where the tokenizer puts one and the text has none.

    Raises:
        RequestError: there is nothing to continue.
    """
    ids, _ = tokenizer.encode(prompt)
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        raise RequestError("the prompt is empty and the tokenizer has no token to begin with", hint="give at least one character")
    return ids


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """The answer to one prompt in pieces of whole characters, as soon as they are certain; together, the text of `generate`.

    Closing the iterator ends the work before the next token. The arguments are those of `generate`.
    """
    with closing(stream_pieces(model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling)) as pieces:
        yield from (piece.text for piece in pieces if piece.text)


def stream_pieces(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Generator[Piece]:
    """`stream` with a count of tokens. The last piece, perhaps without text, counts all and says whether the model ended the answer.

    An ensemble has to vote first: its answer comes in one piece. The arguments are those of `generate`.
    """
    from ftcli.layout.virtual import soft_prompt_members

    if len(soft_prompt_members(model)) > 1:
        answer = generate(model, tokenizer, [prompt], max_new_tokens=max_new_tokens, sampling=sampling)[0]
        yield Piece(answer.text, len(answer.tokens), answer.stopped)
        return
    ids = prompt_ids(tokenizer, prompt)
    settings = _generation_config(tokenizer, _room_for_answer(model, ids, max_new_tokens, "prompt"), sampling)
    pieces = PieceDecoder(tokenizer, ids)
    num_tokens, stopped = 0, False
    with closing(_token_stream(model, ids, settings, sampling.seed)) as tokens:
        for token in tokens:
            if token in tokenizer.stop_ids:
                stopped = True
                break
            num_tokens += 1
            if text := pieces.add(token):
                yield Piece(text, num_tokens)
        yield Piece(pieces.rest(), num_tokens, stopped)


class PieceDecoder:
    """Turns tokens that come one by one into text, holding back what a later token may still change.

    Args:
        prompt: the tokens before the first; their text is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(prompt)
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes; empty in the middle of a character."""
        self._pending.append(token)
        text = self.rest()
        if not text or text.endswith(INCOMPLETE):
            return ""
        # the last piece is context enough: it begins and ends with a whole character
        self._context, self._pending = self._pending, []
        return text

    def rest(self) -> str:
        """What is held back."""
        return decode_after(self._tokenizer, self._context, self._pending)


def decode_after(tokenizer: Tokenizer, context: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens` as it reads after `context`: decoded alone, many tokenizers drop the space it begins with."""
    told = tokenizer.decode(list(context))
    text = tokenizer.decode([*context, *tokens])
    return text[len(told) :] if text.startswith(told) else tokenizer.decode(list(tokens))


@contextmanager
def ordinary_attention(model: nn.Module) -> Iterator[None]:
    """The model as it generates: attention that can use a key/value cache, no dropout, no generation defaults of its own.

    All of it is put back at the end.
    """
    from transformers import GenerationConfig

    from ftcli.layout.attention import FOREST_ATTENTION
    from ftcli.layout.model import inner_model
    from ftcli.models.classifier import is_classifier

    inner = inner_model(model)
    if is_classifier(inner):
        raise RequestError("this model answers with labels, not with text", hint="ftcli predict RUN --data rows.jsonl")
    attention, defaults = inner.config._attn_implementation, inner.generation_config
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        inner.generation_config = GenerationConfig()
        if attention == FOREST_ATTENTION:
            inner.set_attn_implementation(_own_attention(inner))
        yield
    finally:
        inner.generation_config = defaults
        if attention == FOREST_ATTENTION:
            inner.set_attn_implementation(attention)
        for module in training:
            module.training = True


def context_length(model: nn.Module) -> int | None:
    """Tokens the model can see at once, without those of its soft prompt; None where its configuration names no limit."""
    from ftcli.layout.model import inner_model
    from ftcli.layout.virtual import num_virtual_tokens

    length = getattr(inner_model(model).config.get_text_config(), "max_position_embeddings", None)
    return length - num_virtual_tokens(model) if isinstance(length, int) and length > 0 else None


def _own_attention(inner: PreTrainedModel) -> str:
    """The fastest attention of transformers that computes this model; scaled_dot_product_attention knows no soft cap."""
    if getattr(inner.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "eager"
    return inner.get_correct_attn_implementation(None)


def _room_for_answer(model: nn.Module, ids: Sequence[int], max_new_tokens: int, where: str) -> int:
    """How many tokens an answer to `ids` may have: `max_new_tokens`, or fewer at the end of the context."""
    length = context_length(model)
    if length is None:
        return max_new_tokens
    if len(ids) >= length:
        problem = Problem(where, f"{len(ids)} tokens leave no room for an answer in a context of {length}", "shorten it")
        raise RequestError("a prompt is too long", [problem])
    return min(max_new_tokens, length - len(ids))


def _padding_matters(model: nn.Module, num_tokens: int) -> bool:
    """Whether padding would change answers: it stands between a key/value prefix and the text, and a window counts it."""
    from ftcli.layout.model import inner_model
    from ftcli.layout.virtual import has_prefix, num_virtual_tokens

    config = inner_model(model).config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return has_prefix(model) and any(window is not None and num_virtual_tokens(model) + num_tokens > window for window in windows)


def _batches(lengths: Sequence[int], room: Sequence[int], batch_size: int, of_one_length: bool = False) -> Iterator[list[int]]:
    """Indices of prompts that are answered together: similar lengths (or equal ones), the same room, the longest first.

    The longest go first so that what does not fit in memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-room[index], -lengths[index], index))
    batch: list[int] = []
    for index in order:
        is_other = bool(batch) and (room[index] != room[batch[0]] or (of_one_length and lengths[index] != lengths[batch[0]]))
        if len(batch) == batch_size or is_other:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _generation_config(tokenizer: Tokenizer, max_new_tokens: int, sampling: Sampling) -> GenerationConfig:
    from transformers import GenerationConfig

    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature >= MIN_TEMPERATURE:
        top_p = 1.0 if sampling.top_p is None else sampling.top_p
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": top_p, "top_k": sampling.top_k or 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(tokenizer.stop_ids) or None,
        pad_token_id=_padding(tokenizer),
        use_cache=True,
        **choice,
    )


def _padding(tokenizer: Tokenizer) -> int:
    """Any token will do: the attention mask hides it, and an answer ends before it."""
    return next((token for token in (tokenizer.pad_id, tokenizer.eos_id) if token is not None), 0)


def _continue(model: nn.Module, prompts: Sequence[Sequence[int]], settings: GenerationConfig, **options: Any) -> list[list[int]]:
    """The up to N tokens after each prompt, with the stop token, and with padding after it; a row for each member of an ensemble."""
    import torch

    from ftcli.layout.virtual import soft_prompt_members

    longest = max(map(len, prompts))
    padded = [[settings.pad_token_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    device = next(model.parameters()).device
    input_ids, attention_mask = torch.tensor(padded, device=device), torch.tensor(mask, device=device)
    if soft_prompt_members(model):
        from ftcli.models.prompted import continue_prompted

        return continue_prompted(model, input_ids, attention_mask, settings, **options)
    run = cast("Callable[..., torch.Tensor]", model.generate)
    output = run(input_ids=input_ids, attention_mask=attention_mask, generation_config=settings, **options)
    return output[:, longest:].tolist()


def _answer(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], stop: Sequence[str]) -> Answer:
    end = next((index for index, token in enumerate(new) if token in tokenizer.stop_ids), None)
    tokens = list(new[:end])
    whole = decode_after(tokenizer, prompt, tokens)
    text = cut_before(whole, stop)
    return Answer(text, tuple(tokens), stopped=end is not None or len(text) < len(whole))


def _log_prob(recorder: LogProbRecorder, row: int, answer: Answer, new: Sequence[int]) -> float:
    return recorder.log_prob(row, new[: len(answer.tokens) + int(answer.stopped)])


def cut_before(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of `stop` in it; empty ones stop nothing."""
    ends = [place for one in stop if one and (place := text.find(one)) >= 0]
    return text[: min(ends)] if ends else text


class _StopTexts:
    """Asked by transformers after every token which rows have ended, because a stop text stands in the last tokens of them.

    What it overlooks (a text that only reads so after the prompt) costs time alone: answers are cut by their whole text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.ends: dict[int, int] = {}
        """How many tokens each ended row has."""
        self._tokenizer, self._stop = tokenizer, stop
        # a token is a byte at the least; the few before are there because the first token's space may not be decoded
        self._window = max(len(text.encode()) for text in stop) + 4
        self._num_made = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        import torch

        self._num_made += 1
        for row, last in enumerate(input_ids[:, -min(self._num_made, self._window) :].tolist()):
            if row not in self.ends:
                text = self._tokenizer.decode(last)
                if cut_before(text, self._stop) != text:
                    self.ends[row] = self._num_made
        return torch.tensor([row in self.ends for row in range(len(input_ids))], device=input_ids.device)


class _Unwanted:
    """Asked by transformers after every token whether the answers are to be gone on with."""

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        self._is_wanted = is_wanted

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        import torch

        return torch.full((len(input_ids),), not self._is_wanted(), dtype=torch.bool, device=input_ids.device)


def _token_stream(model: nn.Module, ids: Sequence[int], settings: GenerationConfig, seed: int) -> Generator[int]:
    """The tokens of one answer as they are made, in a thread of their own: transformers hands them to a callback."""
    import torch

    made: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    is_closed = threading.Event()

    class Streamer:
        """What transformers calls with the prompt first, then with each token."""

        is_prompt = True

        def put(self, tokens: torch.Tensor) -> None:
            if not self.is_prompt:
                made.put(int(tokens))
            self.is_prompt = False

        def end(self) -> None:
            """The thread says so itself, whether it ends well or not."""

    def is_over(input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), is_closed.is_set(), dtype=torch.bool, device=input_ids.device)

    def work() -> None:
        try:
            with ordinary_attention(model), torch.inference_mode(), torch.random.fork_rng(devices=_cuda_devices(model)):
                torch.manual_seed(seed)
                _continue(model, [ids], settings, streamer=Streamer(), stopping_criteria=[is_over])
        finally:
            made.put(None)

    with ThreadPoolExecutor(max_workers=1) as pool:
        result = pool.submit(work)
        try:
            while (token := made.get()) is not None:
                yield token
            result.result()
        finally:
            is_closed.set()


def _cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices whose random state sampling changes."""
    device = next(model.parameters()).device
    return [device.index or 0] if device.type == "cuda" else []
