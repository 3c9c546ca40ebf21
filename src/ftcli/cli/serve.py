"""`ftcli serve BASE|RUN [--adapter NAME=DIR ...]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ftcli.serving.engine import Engine
    from ftcli.serving.server import Limits, Server


def serve(
    target: Annotated[str, typer.Argument(help="A base, a run, a checkpoint or an adapter: a folder, builtin:NAME, or a hub id.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME=DIR: an adapter folder or a run, asked for as model NAME; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; the default is reached from this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer that may be asked for.")] = 1024,
    max_body: Annotated[int, typer.Option("--max-body", min=1024, help="Largest request, in bytes.")] = 2**20,
    max_waiting: Annotated[int, typer.Option("--max-waiting", min=1, help="Requests in the line; more are answered with 429.")] = 256,
    template: Annotated[
        str | None, typer.Option(help="For models that have no chat template: `chatml`, `plain`, or a path to a Jinja file.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps; auto takes an accelerator where there is one.")] = "auto",
) -> None:
    """Answer OpenAI-style requests with one base and its adapters, for trying them out; Ctrl-C ends it."""
    from ftcli.reporting.live import Reporter

    adapters = _adapters(adapter or [])
    from ftcli.models.quiet import quiet_libraries
    from ftcli.serving.engine import Engine
    from ftcli.serving.models import no_conversations, serve_models
    from ftcli.serving.server import Limits

    with Reporter() as reporter:
        with quiet_libraries():
            served = serve_models(target, adapters, device, template)
        engine = Engine(served, max_waiting=max_waiting)
        server = _listen(host, port, engine, Limits(body_bytes=max_body, max_tokens=max_tokens))
        if not server.is_local:
            reporter.note(f"warning: {host} can be reached from other machines, and there is no password")
        bound = server.server_address[1]
        shown = f"[{host}]" if ":" in host else host
        reporter.note(f"models: {', '.join(served.names)}")
        for name, tokenizer in served.tokenizers.items():
            if tokenizer.chat_template is None:
                reporter.note(f"note: {no_conversations(name, tokenizer)}")
        reporter.note(f"listening at http://{shown}:{bound}/v1 (Ctrl-C ends it)")
        _run(server, engine)
        reporter.note("stopped")


def _adapters(given: list[str]) -> dict[str, str]:
    from ftcli.errors import UsageError

    adapters: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise UsageError(f"--adapter {text} is not NAME=DIR", hint="--adapter orders=runs/orders")
        if name in adapters:
            raise UsageError(f"--adapter {name} is given twice", hint="each adapter has a name of its own")
        adapters[name] = folder
    return adapters


def _listen(host: str, port: int, engine: Engine, limits: Limits) -> Server:
    from ftcli.errors import UsageError
    from ftcli.serving.server import Server

    try:
        return Server((host, port), engine, limits)
    except (OSError, OverflowError) as error:
        engine.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen at {host}:{port}: {reason.lower()}", hint="--port 0 takes a free port") from error


def _run(server: Server, engine: Engine) -> None:
    import signal

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        engine.close()
