"""Answers to prompts: many at once in batches, or one as a stream of text.

A batch is left-padded and made of prompts of similar length, so that little padding is computed and an answer does not depend on
what it was batched with. Decoding is plain: greedy unless asked otherwise, and whatever a model's generation_config.json says
about sampling or penalties is left out, so that a score depends on the weights alone.
Legend: ``B`` prompts in a batch, ``L`` tokens of its longest prompt, ``N`` new tokens.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from ftcli.errors import Problem, RequestError

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedModel

    from ftcli.models.tokenizer import Tokenizer

BATCH_SIZE = 64
INCOMPLETE = "�"


class Progress(Protocol):
    """Is told how far a piece of work is."""

    def update(self, done: int, total: int, what: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote after one prompt."""

    text: str
    """Without the token that ended it."""
    tokens: tuple[int, ...]
    """Its token ids, without the one that ended it."""
    stopped: bool
    """Whether the model ended it; False where it was cut at `max_new_tokens` or the end of the context."""


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> list[Answer]:
    """One answer per prompt, in the order of the prompts.

    Args:
        model: a transformers model, or a PEFT model around one; left in the attention and the mode it was in.
        prompts: text as it is to be continued, with whatever a chat template adds.
        temperature: 0 takes the likeliest token each time.
        top_p: samples from the likeliest tokens that hold this share of the probability.
        top_k: samples from so many of the likeliest tokens.
        seed: the same seed, prompts and batch size give the same samples.

    Raises:
        RequestError: a prompt is empty, or leaves no room for an answer in the model's context.
    """
    import torch

    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    room = [_room_for_answer(model, ids, max_new_tokens, f"prompt {index + 1}") for index, ids in enumerate(encoded)]
    answers: list[Answer | None] = [None] * len(prompts)
    done = 0
    with ordinary_attention(model), torch.inference_mode(), torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        for batch in _batches([len(ids) for ids in encoded], room, batch_size):
            settings = _generation_config(tokenizer, room[batch[0]], temperature, top_p, top_k)
            for index, new in zip(batch, _continue(model, [encoded[index] for index in batch], settings), strict=True):
                answers[index] = _answer(tokenizer, encoded[index], new)
            done += len(batch)
            if progress is not None:
                progress.update(done, len(prompts), "generating answers")
    return cast("list[Answer]", answers)


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
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """The answer to one prompt in pieces of whole characters, as soon as they are certain; together, the text of `generate`.

    Closing the iterator ends the work before the next token. The arguments are those of `generate`.
    """
    ids = prompt_ids(tokenizer, prompt)
    settings = _generation_config(tokenizer, _room_for_answer(model, ids, max_new_tokens, "prompt"), temperature, top_p, top_k)
    pieces = PieceDecoder(tokenizer, ids)
    tokens = _token_stream(model, ids, settings, seed)
    try:
        for token in tokens:
            if token in tokenizer.stop_ids:
                break
            if piece := pieces.add(token):
                yield piece
        if rest := pieces.rest():
            yield rest
    finally:
        tokens.close()


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

    inner = inner_model(model)
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
    """Tokens the model can see at once; None where its configuration names no limit."""
    from ftcli.layout.model import inner_model

    length = getattr(inner_model(model).config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


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


def _batches(lengths: Sequence[int], room: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts that are answered together: similar lengths, the same room, the longest first.

    The longest go first so that what does not fit in memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-room[index], -lengths[index], index))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == batch_size or room[index] != room[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _generation_config(
    tokenizer: Tokenizer, max_new_tokens: int, temperature: float, top_p: float | None, top_k: int | None
) -> GenerationConfig:
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0 if top_p is None else top_p, "top_k": top_k or 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(tokenizer.stop_ids) or None,
        pad_token_id=_padding(tokenizer),
        use_cache=True,
        **sampling,
    )


def _padding(tokenizer: Tokenizer) -> int:
    """Any token will do: the attention mask hides it, and an answer ends before it."""
    return next((token for token in (tokenizer.pad_id, tokenizer.eos_id) if token is not None), 0)


def _continue(model: nn.Module, prompts: Sequence[Sequence[int]], settings: GenerationConfig, **options: Any) -> list[list[int]]:
    """The up to N tokens after each of B prompts, with the stop token, and with padding after it."""
    import torch

    longest = max(map(len, prompts))
    padded = [[settings.pad_token_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    device = next(model.parameters()).device
    run = cast("Callable[..., torch.Tensor]", model.generate)
    output = run(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=settings,
        **options,
    )
    return output[:, longest:].tolist()


def _answer(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> Answer:
    end = next((index for index, token in enumerate(new) if token in tokenizer.stop_ids), None)
    tokens = list(new[:end])
    return Answer(decode_after(tokenizer, prompt, tokens), tuple(tokens), stopped=end is not None)


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
