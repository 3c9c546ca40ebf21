"""`ftcli chat TARGET`."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ftcli.exporting.open_target import Loaded
    from ftcli.models.conversation import Conversation

COMMANDS = {"/reset": "forget the conversation", "/system TEXT": "set the system text and begin anew", "/quit": "leave (Ctrl-D, too)"}


def chat(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, a model or adapter folder, builtin:NAME, or a hub id.")],
    system: Annotated[str | None, typer.Option("--system", help="System text.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Sample from this share of the probability.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Sample from so many of the likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, mps; auto takes an accelerator where there is one.")] = "auto",
) -> None:
    """Talk with a run or a model. Ctrl-C stops an answer, Ctrl-D leaves; piped lines are turns, too."""
    from ftcli.cli.generate import asked_sampling
    from ftcli.errors import UsageError

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": asked_sampling(temperature, top_p, top_k, seed)}
    from ftcli.exporting.open_target import open_target
    from ftcli.models.conversation import Conversation

    loaded = open_target(target, device=device)
    if loaded.tokenizer.chat_template is None:
        hint = f"`ftcli generate {target} TEXT` continues plain text"
        raise UsageError(f"`{target}` has no chat template: it cannot be talked with", hint=hint)
    conversation = Conversation(loaded.tokenizer, system)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused, and the talk goes on
    if sys.stdin.isatty():
        _note(f"{loaded.description}; " + ", ".join(f"{command}: {purpose}" for command, purpose in COMMANDS.items()))
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if not _obey(line, conversation):
                break
        elif line:
            _take_turn(loaded, conversation, line, options)


def _read_line() -> str | None:
    """The user's next line; None at the end. On a terminal with editing and history, where Ctrl-C only clears the line."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    import readline  # noqa: F401 - input() edits lines once it is loaded

    try:
        return input("> ").strip()
    except EOFError:
        sys.stdout.write("\n")
        return None
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        _note("Ctrl-D leaves")
        return ""


def _obey(line: str, conversation: Conversation) -> bool:
    """Does what a line that begins with a slash says; False if it says to leave."""
    from ftcli.errors import did_you_mean

    command, _, rest = line.partition(" ")
    match command:
        case "/quit" | "/exit":
            return False
        case "/reset":
            conversation.reset()
            _note("the conversation is forgotten")
        case "/system":
            conversation.system = rest.strip() or None
            conversation.reset()
            _note("the system text is set, the conversation begins anew" if rest.strip() else "there is no system text any more")
        case _:
            hint = did_you_mean(command, [name.split()[0] for name in COMMANDS]) or f"commands: {', '.join(COMMANDS)}"
            _note(f"unknown command `{command}`; {hint}")
    return True


def _take_turn(loaded: Loaded, conversation: Conversation, line: str, options: dict[str, Any]) -> None:
    """Asks, and prints the answer while it is made. A turn that cannot be answered is taken back."""
    from ftcli.cli.console import print_error
    from ftcli.errors import FtcliError
    from ftcli.models.generate import context_length, stream

    context = context_length(loaded.model)
    conversation.ask(line)
    try:
        dropped = conversation.drop_to_fit(None if context is None else context - min(options["max_new_tokens"], context // 4))
        if dropped:
            _note(f"the {dropped} oldest turns are forgotten: the context holds {context} tokens")
        pieces = stream(loaded.model, loaded.tokenizer, conversation.prompt(), **options)
        conversation.answer(_print_until_interrupted(pieces))
    except FtcliError as error:
        conversation.take_back()
        print_error(str(error))


def _print_until_interrupted(pieces: Any) -> str:
    """The text that was printed; Ctrl-C ends it early."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        _note(" (stopped)")
    finally:
        pieces.close()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return text


def _note(text: str) -> None:
    typer.echo(text, err=True)
