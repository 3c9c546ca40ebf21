"""`ftcli generate TARGET [PROMPT]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ftcli.exporting.open_target import Loaded, LoadedAdapters
    from ftcli.models.generate import Answer, Sampling
    from ftcli.models.prompts import Prompt


def generate(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, a model or adapter folder, builtin:NAME, or a hub id.")],
    prompt: Annotated[str | None, typer.Argument(help="What to answer; left out, prompts are read from --prompt-file or stdin.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="One prompt per line, or JSONL with `prompt` or `messages`; - is stdin.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=DIR", help="Put an adapter on the base; prompts choose with `adapter`.")
    ] = None,
    use: Annotated[str | None, typer.Option("--use", metavar="NAME", help="The adapter for prompts that name none, or `base`.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System text for the chat template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample from this share of the probability.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Sample from so many of the likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts answered at once.")] = 64,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, mps; auto takes an accelerator where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Answer prompts with a run or a model; a single answer is printed while it is made."""
    from ftcli.models.prompts import render_prompt

    prompts = _prompts(prompt, prompt_file)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": asked_sampling(temperature, top_p, top_k, seed)}
    if adapter:
        folders = _named_folders(adapter)
        chosen = _chosen(prompts, folders, use)
        from ftcli.exporting.open_target import open_adapters

        opened = open_adapters(target, folders, device=device)
        texts = [render_prompt(item, opened.tokenizer, system=system, raw=raw) for item in prompts]
        _answer_with_adapters(opened, prompts, texts, chosen, as_json, batch_size=batch_size, **options)
        return
    _require_no_choice(prompts, use)
    from ftcli.exporting.open_target import open_target

    loaded = open_target(target, device=device)
    texts = [render_prompt(item, loaded.tokenizer, system=system, raw=raw) for item in prompts]
    if len(texts) == 1 and not as_json:
        from ftcli.models.generate import stream

        write_stream(stream(loaded.model, loaded.tokenizer, texts[0], **options))
    else:
        _answer_all(loaded, prompts, texts, as_json, batch_size=batch_size, **options)


def _named_folders(adapters: list[str]) -> dict[str, str]:
    """Folder of each adapter by its name, which is the folder's own where none is given.

    Raises:
        UsageError: two have the same name, or one that the base has.
    """
    from ftcli.errors import UsageError

    folders: dict[str, str] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        name, folder = (name, folder) if equals else (Path(given).name, given)
        if not name or not folder:
            raise UsageError(f"--adapter {given}: neither a name nor a folder may be empty", hint="--adapter polite=runs/polite")
        if name in folders or name == "base":
            reason = "two adapters are called so" if name in folders else "this is the model without an adapter"
            raise UsageError(f"--adapter {given}: {reason}", hint="--adapter NAME=DIR gives another name")
        folders[name] = folder
    return folders


def _chosen(prompts: list[Prompt], folders: dict[str, str], use: str | None) -> list[str]:
    """Which adapter answers each prompt.

    Raises:
        UsageError: a prompt chooses none and there are several, or one that is not there.
    """
    from ftcli.errors import Problem, UsageError, did_you_mean

    names = [*folders, "base"]
    default = use or (next(iter(folders)) if len(folders) == 1 else None)
    chosen = [prompt.adapter or default for prompt in prompts]
    if use is not None and use not in names:
        raise UsageError(f"--use {use}: there is no such adapter", hint=did_you_mean(use, names) or f"adapters: {', '.join(names)}")
    unknown = [(number, name) for number, name in enumerate(chosen, start=1) if name is not None and name not in names]
    if unknown:
        hint = did_you_mean(unknown[0][1], names) or f"adapters: {', '.join(names)}"
        raise UsageError("a prompt names an adapter that is not given", [Problem(f"prompt {n}", f"`{name}`", hint) for n, name in unknown])
    if None in chosen:
        what = f"prompt {chosen.index(None) + 1} names no adapter, and several are given"
        raise UsageError(what, hint="--use NAME is for prompts that name none, or give each an `adapter`")
    return [name for name in chosen if name is not None]


def _require_no_choice(prompts: list[Prompt], use: str | None) -> None:
    from ftcli.errors import UsageError

    named = next((prompt.adapter for prompt in prompts if prompt.adapter is not None), None)
    if named is not None or use is not None:
        what = f"--use {use}" if use is not None else f"a prompt names the adapter `{named}`"
        raise UsageError(f"{what}, and none is given", hint="--adapter NAME=DIR")


def asked_sampling(temperature: float, top_p: float | None, top_k: int | None, seed: int) -> Sampling:
    """What the options of a command ask for.

    Raises:
        UsageError: an option has no effect, or is out of range.
    """
    import math

    from ftcli.errors import UsageError
    from ftcli.models.generate import Sampling

    if not math.isfinite(temperature):
        raise UsageError(f"--temperature {temperature}: not a finite number")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p}: not above 0 and at most 1")
    if temperature == 0 and (top_p is not None or top_k is not None):
        option = "--top-p" if top_p is not None else "--top-k"
        raise UsageError(f"{option} needs a --temperature above 0", hint="--temperature 0.8")
    return Sampling(temperature, top_p, top_k, seed)


def write_stream(pieces: Iterator[str]) -> str:
    """Writes the pieces to stdout as they come, ends the line, and returns the text."""
    import sys

    text = ""
    for piece in pieces:
        text += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return text


def _prompts(prompt: str | None, prompt_file: Path | None) -> list[Prompt]:
    import sys

    from ftcli.errors import UsageError
    from ftcli.models.prompts import Prompt, read_prompts

    if prompt is not None and prompt_file is not None:
        raise UsageError("both a prompt and --prompt-file are given", hint="give one of them")
    if prompt is not None:
        return [Prompt(prompt)]
    if prompt_file is None and sys.stdin.isatty():
        raise UsageError("there is no prompt", hint='ftcli generate TARGET "Once upon a time", or --prompt-file, or text on stdin')
    if prompt_file is None or str(prompt_file) == "-":
        return read_prompts(_decoded(sys.stdin.buffer.read(), "stdin"), "stdin")
    try:
        content = prompt_file.read_bytes()
    except OSError as error:
        raise UsageError(f"the prompt file `{prompt_file}` cannot be read: {(error.strerror or str(error)).lower()}") from None
    return read_prompts(_decoded(content, str(prompt_file)), str(prompt_file))


def _decoded(content: bytes, name: str) -> list[str]:
    from ftcli.errors import DataError

    try:
        return content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}") from None


def _answer_with_adapters(
    opened: LoadedAdapters, prompts: list[Prompt], texts: list[str], chosen: list[str], as_json: bool, **options: Any
) -> None:
    """Answers of each adapter to its prompts, in the order of the prompts."""
    import sys

    from ftcli.models.generate import generate as generate_answers
    from ftcli.reporting.live import Reporter

    answers: dict[int, Answer] = {}
    with Reporter(stream=sys.stderr) as reporter:
        for name in dict.fromkeys(chosen):
            indices = [index for index, other in enumerate(chosen) if other == name]
            module = opened.adapters.use(name)
            found = generate_answers(module, opened.tokenizer, [texts[index] for index in indices], progress=reporter, **options)
            answers |= dict(zip(indices, found, strict=True))
    _write_answers(opened.description, prompts, [answers[index] for index in range(len(prompts))], as_json, chosen)


def _answer_all(loaded: Loaded, prompts: list[Prompt], texts: list[str], as_json: bool, **options: Any) -> None:
    import sys

    from ftcli.models.generate import generate as generate_answers
    from ftcli.reporting.live import Reporter

    with Reporter(stream=sys.stderr) as reporter:
        answers = generate_answers(loaded.model, loaded.tokenizer, texts, progress=reporter, **options)
    _write_answers(loaded.description, prompts, answers, as_json, None)


def _write_answers(description: str, prompts: list[Prompt], answers: list[Answer], as_json: bool, chosen: list[str] | None) -> None:
    from ftcli.cli.console import print_json

    if not as_json:
        typer.echo("\n\n".join(answer.text for answer in answers))
        return
    rows = [
        {
            "prompt": prompt.text if prompt.text is not None else list(prompt.messages),
            "answer": answer.text,
            "num_tokens": len(answer.tokens),
            "stopped": answer.stopped,
            **({} if chosen is None else {"adapter": chosen[index]}),
        }
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    print_json({"target": description, "answers": rows})
