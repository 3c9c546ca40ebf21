"""A first recipe for a model and a data file, made after looking at both."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ftcli.errors import DataError, UsageError, did_you_mean
from ftcli.recipe.schema import EDITOR_LINE
from ftcli.recipe.yaml import scalar

if TYPE_CHECKING:
    from ftcli.data.formats import Format
    from ftcli.data.sources import Source
    from ftcli.models.tokenizer import Tokenizer

NUM_ROWS_READ = 200
"""Rows that are rendered and tokenised."""
MAX_ROWS_COUNTED = 100_000
OUTLIER = 4
"""A longest row of more than this times the 95th percentile is left out rather than making every batch ready for it."""
LENGTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536, 131072)

_PLAIN = re.compile(r"[A-Za-z0-9_./~][A-Za-z0-9_./~@+-]*(:[A-Za-z0-9_./~@+-]+)*")


@dataclass(frozen=True, slots=True)
class ModelLook:
    """What a model's small files say."""

    reference: str
    vocab_size: int
    context: int | None
    """Positions the model was made for, where its configuration says so."""
    template: str | None
    """Name of ftcli's template to use because the tokenizer has none of its own; None where it has."""
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class DataLook:
    """What the first rows of a source say."""

    source: Source
    format: Format
    num_rows: int
    is_all: bool
    """`num_rows` is exact, else there are more."""
    median: int
    p95: int
    longest: int
    """Tokens of the longest row; estimated from its characters where it is not among the first rows."""


def look_at_model(reference: str) -> ModelLook:
    """
    Raises:
        RequestError: there is no such model, or it has no tokenizer that can be read.
    """
    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(reference)
    template = None
    if tokenizer.chat_template is None:
        template = "chatml" if tokenizer.backend.token_to_id("<|im_end|>") is not None else "plain"
        tokenizer = load_tokenizer(reference, template=template)
    return ModelLook(reference, tokenizer.vocab_size, _context(tokenizer.folder / "config.json"), template, tokenizer)


def _context(config_file: Path) -> int | None:
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    config |= config.get("text_config") or {}
    sizes = (config.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def open_source(reference: str, split: str = "train") -> Source:
    """The source that a command line names: a file, folder or glob, or builtin:NAME."""
    from ftcli.data.sources.builtin import Builtin
    from ftcli.data.sources.file import File

    if reference.startswith("builtin:"):
        return Builtin(kind="builtin", name=reference.removeprefix("builtin:"), split=split)
    return File(kind="file", path=reference)


def look_at_data(source: Source, tokenizer: Tokenizer) -> DataLook:
    """What the source holds, from its first rows and a count of the others.

    Raises:
        DataError: it cannot be read, no format fits, or one of the first rows does not fit.
    """
    from ftcli.data.formats.detect import detect_format

    rows = iter(source.rows())
    first = list(itertools.islice(rows, NUM_ROWS_READ))
    if not first:
        raise DataError(f"`{source.label()}` has no rows")
    settings = detect_format([row for _, row in first], source.label())
    lengths = [_num_tokens(settings, row, where, tokenizer) for where, row in first]
    tokens_per_character = max(length / _size(row) for length, (_, row) in zip(lengths, first, strict=True))
    others, longest_size = _count(rows, MAX_ROWS_COUNTED - len(first))
    lengths.sort()
    return DataLook(
        source=source,
        format=settings,
        num_rows=len(first) + others,
        is_all=len(first) + others < MAX_ROWS_COUNTED,
        median=lengths[len(lengths) // 2],
        p95=lengths[math.ceil(0.95 * len(lengths)) - 1],
        longest=max(lengths[-1], math.ceil(longest_size * tokens_per_character)),
    )


def _num_tokens(settings: Format, row: dict[str, Any], where: str, tokenizer: Tokenizer) -> int:
    example = settings.example(row, tokenizer, where)
    return sum(len(tokenizer.encode(segment.text)[0]) for segment in example.segments) + example.add_bos


def _count(rows: Iterator[tuple[str, dict[str, Any]]], limit: int) -> tuple[int, int]:
    """(number of rows, size of the largest), of at most `limit` rows."""
    count = largest = 0
    for _, row in itertools.islice(rows, limit):
        count += 1
        largest = max(largest, _size(row))
    return count, largest


def _size(row: dict[str, Any]) -> int:
    """About how many characters a row has: cheap, and in proportion to its tokens."""
    return len(str(row))


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers of a first recipe."""

    max_length: int
    drops: bool
    """Longer rows are outliers and left out."""
    epochs: int
    global_batch_size: int
    interval: int
    """Steps between evaluations, and between checkpoints."""
    log: int


def plan(data: DataLook, context: int | None) -> Plan:
    """Numbers that fit the data: every row but outliers whole, at least a hundred steps where five epochs give them.

    Args:
        context: positions of the model; no row may be longer.
    """
    limit = min(context or LENGTHS[-1], LENGTHS[-1])
    is_text = data.format.kind == "text"  # texts are split, so that no row is too long
    wanted = data.p95 if is_text or data.longest > OUTLIER * data.p95 else data.longest
    max_length = min(next((length for length in LENGTHS if length >= wanted), limit), limit)
    num_examples = data.num_rows * max(1, round(data.median / max_length)) if is_text else data.num_rows
    batch = 32 if num_examples >= 2000 else 16 if num_examples >= 500 else min(8, num_examples)
    epochs = 1 if is_text else min(5, max(1, math.ceil(100 * batch / num_examples)))
    steps = math.ceil(num_examples * epochs / batch)
    fifth = max(1, round(steps / 5))
    interval = min(500, fifth if fifth < 20 else round(fifth, -1))
    return Plan(max_length, data.longest > max_length and not is_text, epochs, batch, interval, log=10 if steps >= 100 else 1)


def methods() -> dict[str, Any]:
    """The classes of all methods, by kind."""
    from ftcli.methods import Method

    return {choice.model_fields["kind"].default: choice for choice in get_args(get_args(Method)[0])}


def check_method(kind: str) -> None:
    """
    Raises:
        UsageError: there is no method of that kind.
    """
    kinds = list(methods())
    if kind not in kinds:
        raise UsageError(f"unknown method `{kind}`", hint=did_you_mean(kind, kinds) or f"methods: {', '.join(kinds)}")


def draft(model: ModelLook, data: DataLook, evaluation: DataLook | None, method: str, folder: Path) -> str:
    """A commented recipe, to be kept in `folder`."""
    numbers = plan(data, model.context)
    rows = f"{data.num_rows}{'' if data.is_all else ' or more'} rows"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{data.source.label()}-{method}").lstrip("._-") or method
    lines = [
        EDITOR_LINE,
        "version: 1",
        f"name: {name}",
        "",
        "model:",
        f"  base: {_written(_reference(model.reference, folder))}",
    ]
    if model.template is not None and data.format.kind in ("chat", "instruction"):
        lines.append(f"  template: {model.template}  # the tokenizer has no chat template; this one comes with ftcli")
    lines += [
        "",
        "data:",
        "  train:",
        f"    # {rows}; tokens: median {data.median}, 95 % up to {data.p95}, longest about {data.longest}",
        f"    - source: {_source(data.source, folder)}",
        f"      format: {_format(data.format)}",
    ]
    if evaluation is not None:
        lines += ["  evaluation:", f"    - source: {_source(evaluation.source, folder)}", f"      format: {_format(evaluation.format)}"]
    else:
        share = 0.05 if data.num_rows >= 100 else 0.2
        lines.append(f"  holdout: {share}  # share of the rows kept for evaluation; give `evaluation` where there are others")
    lines.append(f"  max_length: {numbers.max_length}  # tokens")
    if numbers.drops:
        way_out = "the model has no more positions" if numbers.max_length == model.context else "or raise max_length"
        lines.append(f"  on_overflow: drop  # longer rows are left out, counted and listed; {way_out}")
    lines += [
        "",
        *_method_lines(method),
        "objective: {kind: causal-lm}  # prompt_loss_weight: 0.1 would learn a little from the prompts, too",
        "",
        "train:",
        f"  epochs: {numbers.epochs}",
        f"  global_batch_size: {numbers.global_batch_size}  # examples per step",
        f"  # lr: the peak; the default is {method}'s, scaled to the width of the model, and `ftcli check` says it",
        "  schedule: {kind: cosine, warmup_ratio: 0.03}",
        "  seed: 17",
        "",
        f"every: {{log: {numbers.log}, evaluate: {numbers.interval}, save: {numbers.interval}}}  # steps",
    ]
    return "\n".join(lines) + "\n"


def _method_lines(kind: str) -> list[str]:
    if "rank" in methods()[kind].model_fields:
        return [f"method: {{kind: {kind}, rank: 16}}  # a larger rank can learn more and costs memory"]
    return [f"method: {{kind: {kind}}}"]


def _reference(model: str, folder: Path) -> str:
    """A model as a recipe in `folder` names it: `./` tells a local folder from a hub id."""
    if model.startswith("builtin:") or not Path(model).expanduser().is_dir():
        return model
    path = _path(os.path.abspath(Path(model).expanduser()), folder)
    return path if path.startswith((".", "/")) else f"./{path}"


def _path(path: str, folder: Path) -> str:
    """An absolute path as a recipe in `folder` names it: relative while it is near."""
    relative = os.path.relpath(path, folder)
    return path if relative.startswith("../../..") else relative


def _source(source: Source, folder: Path) -> str:
    if source.kind == "builtin":
        split = "" if source.split == "train" else f", split: {source.split}"
        return f"{{kind: builtin, name: {_written(source.name)}{split}}}"
    assert source.kind == "file", "a command line names files and what comes with ftcli"
    return f"{{kind: file, path: {_written(_path(source.path, folder))}}}"


def _format(settings: Format) -> str:
    """The format's kind and the settings that are not its defaults."""
    changed = {name: value for name, value in settings.model_dump().items() if value != type(settings).model_fields[name].default}
    return "{" + ", ".join(f"{key}: {_written(value)}" for key, value in ({"kind": settings.kind} | changed).items()) + "}"


def _written(value: Any) -> str:
    """A value as YAML in brackets takes it, quoted where it would not be read as this text."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and scalar(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
