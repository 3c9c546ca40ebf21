"""Sources of kind `self`: the base model writes its texts into the cache, and the recipe's data reads them from there.

A text is written in rounds, each of which is a pure function of the settings and its number, and is on the disk before the next one
begins: a killed run goes on after its last whole round.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.formats.text import Text
from ftcli.data.sources.file import File
from ftcli.data.sources.own_text import OwnText
from ftcli.errors import Problem, RequestError, RunError
from ftcli.files import said_when_disk_is_full
from ftcli.models.fingerprint import answers_fingerprint, stored_fingerprint
from ftcli.training.seeds import derive_seed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftcli.data.prepare import Progress
    from ftcli.data.settings import Data, EvaluationSource, TrainSource
    from ftcli.models.tokenizer import Tokenizer
    from ftcli.recipe.recipe import Recipe

ROUND_SIZE = 64  # samples that are written together
SMOKE_TOKENS = 1024
KEY_LENGTH = 32


def with_own_text(recipe: Recipe, cache_folder: Path, progress: Progress | None, first_rows: int | None = None) -> tuple[Data, list[str]]:
    """The recipe's data with the model's samples in place of sources of kind `self`, and a line about each of them.

    Args:
        first_rows: the run is to read only so many rows of each source; then few are written.

    Raises:
        RequestError: the base cannot be had, or has no token to begin a text with.
    """
    data = recipe.data
    sources = [*(entry.source for entry in data.train), *(entry.source for entry in data.evaluation)]
    if not any(isinstance(source, OwnText) for source in sources):
        return data, []
    writer = _Writer(recipe, cache_folder, progress)
    notes: list[str] = []

    def bound(entry: TrainSource | EvaluationSource) -> TrainSource | EvaluationSource:
        if not isinstance(entry.source, OwnText):
            return entry
        settings = entry.source
        if first_rows is not None:
            settings = settings.model_copy(update={"tokens": min(settings.tokens, SMOKE_TOKENS)})
        path = writer.written(settings)
        notes.append(f"`{entry.name or settings.label()}` is {settings.tokens} tokens that {recipe.model.base} wrote itself: {path}")
        # A sample that ended has its EOS in its text.
        return entry.model_copy(update={"source": File(path=str(path)), "format": entry.format or Text(append_eos=False)})

    changed = {"train": tuple(map(bound, data.train)), "evaluation": tuple(map(bound, data.evaluation))}
    writer.close()
    return data.model_copy(update=changed), notes


class _Writer:
    """Finds the samples of the recipe's base in the cache, or has them written; the model is loaded when it is needed first."""

    def __init__(self, recipe: Recipe, cache_folder: Path, progress: Progress | None) -> None:
        self._recipe, self._progress = recipe, progress
        # The base as it is: what the recipe adds to it has nothing to say yet.
        self._settings = recipe.model.model_copy(update={"add_tokens": None, "grow": None, "rope": None})
        self._tokenizer = self._settings.load_tokenizer()
        self._folder = cache_folder / "self"
        self._model: nn.Module | None = None

    def written(self, settings: OwnText) -> Path:
        """The file with the samples."""
        device = _device(self._recipe).type  # decides what `auto` is, and how numbers are rounded
        how = [self._settings.dtype, self._settings.attention, device]
        content = [self._base(), self._tokenizer.fingerprint, *how, settings.model_dump(mode="json")]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:KEY_LENGTH]
        # Named for what it is: a file source is called after its file.
        path = self._folder / key / "self.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_own_text(self._loaded(), self._tokenizer, settings, path, self._progress)
        return path

    def close(self) -> None:
        """Let go of the model's memory."""
        import torch

        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _base(self) -> str:
        """What the base is, from its files where it has any."""
        from ftcli.models.locate import model_folder

        model = self._settings
        if model.base is None:
            loaded: Any = self._loaded()
            return answers_fingerprint(loaded, loaded.named_parameters())
        return stored_fingerprint(model_folder(model.base, model.revision))

    def _loaded(self) -> nn.Module:
        if self._model is None:
            from ftcli.models.load import load_model

            settings, seed = self._settings, derive_seed(self._recipe.train.seed, "model")
            self._model = load_model(settings, self._tokenizer, dtype=settings.dtype, device=_device(self._recipe), seed=seed)
        return self._model


def _device(recipe: Recipe) -> torch.device:
    """The recipe's device; `auto` is the first accelerator."""
    import torch

    wanted = recipe.train.device
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(found if wanted == "auto" else wanted)


@dataclass(frozen=True, slots=True)
class _Round:
    """Samples that were written together."""

    number: int
    num_tokens: int
    texts: list[str]


def write_own_text(model: nn.Module, tokenizer: Tokenizer, settings: OwnText, path: Path, progress: Progress | None) -> None:
    """Write a jsonl file of samples of `model`, each a row with its `text`; there is all of it under its name, or nothing.

    Raises:
        RequestError: nothing is there to begin a text with.
        RunError: the model writes nothing, or the disk is full.
    """
    beginnings = settings.beginnings or (_nothing_said(tokenizer),)
    partial = path.with_suffix(".partial")
    with said_when_disk_is_full(path):
        rounds = _whole_rounds(partial)
        num_tokens = sum(done.num_tokens for done in rounds)
        with partial.open("w", encoding="utf-8") as file:
            for done in rounds:
                _append(file, done)
            number = len(rounds)
            while num_tokens < settings.tokens:
                if progress is not None:
                    progress.update(num_tokens, settings.tokens, "writing replay text (tokens)")
                count = min(ROUND_SIZE, -(-(settings.tokens - num_tokens) // settings.max_length))
                done = _write_round(model, tokenizer, settings, beginnings, number, count)
                if done.num_tokens == 0:
                    raise RunError("the base model writes nothing: all of its samples are empty", hint="give `beginnings`")
                _append(file, done)
                number, num_tokens = number + 1, num_tokens + done.num_tokens
        rows = [{"text": text} for done in _whole_rounds(partial) for text in done.texts]
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def _write_round(model: nn.Module, tokenizer: Tokenizer, settings: OwnText, beginnings: tuple[str, ...], number: int, count: int) -> _Round:
    """`count` samples; those without any text are left out."""
    from ftcli.models.generate import Sampling, generate

    prompts = [beginnings[(number * ROUND_SIZE + index) % len(beginnings)] for index in range(count)]
    answers = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=settings.max_length,
        sampling=Sampling(settings.temperature, seed=derive_seed(settings.seed, "self", number)),
        # some models end a text only by beginning the next
        stop=[] if tokenizer.bos_token is None else [tokenizer.bos_token],
        batch_size=ROUND_SIZE,
    )
    texts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = (prompt if settings.beginnings else "") + answer.text
        if text.strip():
            texts.append(text + (tokenizer.eos_token or "" if answer.stopped else ""))
    return _Round(number, sum(len(answer.tokens) for answer in answers), texts)


def _append(file: Any, done: _Round) -> None:
    file.write(json.dumps([done.number, done.num_tokens, done.texts], ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _whole_rounds(path: Path) -> list[_Round]:
    """The rounds of a file that was not finished, as far as they are whole and in order."""
    rounds: list[_Round] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            number, num_tokens, texts = json.loads(line)
        except ValueError:
            break
        if number != len(rounds):
            break
        rounds.append(_Round(number, num_tokens, texts))
    return rounds


def _nothing_said(tokenizer: Tokenizer) -> str:
    """The prompt of a text that has not begun: BOS is put before an empty one, and EOS stands behind the text before.

    Raises:
        RequestError: the tokenizer has neither.
    """
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        return ""
    if tokenizer.eos_token is not None:
        return tokenizer.eos_token
    problem = Problem("data.train", "the tokenizer has no BOS and no EOS token to begin a text with", "give `beginnings` of the source")
    raise RequestError("the base model cannot write text of its own", [problem])
