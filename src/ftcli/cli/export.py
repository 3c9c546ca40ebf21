"""`ftcli export TARGET --to FORMAT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftcli.exporting.export import ExportReport
    from ftcli.exporting.formats.format import Format


ELSEWHERE = {
    "awq": "`--to gptq` rounds by the same data into the same layout; or export --to hf and run llm-compressor on it",
    "openvino": "export --to hf, then: optimum-cli export openvino --model FOLDER OUT; or --to onnx",
    "mlx": "export --to hf, then on a Mac: mlx_lm.convert --hf-path FOLDER",
}
"""Formats that other tools make, and how."""


def export(
    targets: Annotated[list[str], typer.Argument(help="A run, a checkpoint, an adapter or model folder, builtin:NAME, or a hub id.")],
    to: Annotated[str, typer.Option("--to", help="hf, adapter, gguf, ollama, onnx, int8, int4, gptq, vllm.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The new folder; the default is TARGET-FORMAT beside it.")] = None,
    dtype: Annotated[
        str, typer.Option(help="How weights are stored: float32, bfloat16, float16; for gguf f16, q8_0, q4_k_m, ...")
    ] = "auto",
    data: Annotated[Path | None, typer.Option(help="For gptq: a file of rows to round by; a run has its own.")] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest file of weights: 5GB, 500MB.")] = "5GB",
    push: Annotated[str | None, typer.Option("--push", help="Then upload it to this repository of the hub: OWNER/NAME.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Write a model in the form the next tool loads, load it back, and print how far it is from its source."""
    import sys

    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.exporting.export import export as export_targets
    from ftcli.reporting.live import Reporter

    form = _format(to, dtype, max_shard_size, data)
    folder = output or _default_folder(targets[0], to)
    with words_on_stderr(as_json), Reporter(stream=sys.stderr if as_json else None) as reporter:
        if push is not None:
            from ftcli.exporting.push import check_repository

            check_repository(push)
        report = export_targets(targets, form, folder, device=device, to_hub=push is not None, progress=reporter)
        _say(report, reporter.note)
        if push is not None:
            from ftcli.exporting.push import push_folder

            reporter.note(f"pushed: {push_folder(folder, push)}")
    if as_json:
        print_json(report.to_json())


def _format(name: str, dtype: str, max_shard_size: str, data: Path | None) -> Format:
    from ftcli.errors import UsageError, did_you_mean
    from ftcli.exporting.formats import FORMATS

    if name in ELSEWHERE:
        raise UsageError(f"`{name}` is not offered", hint=ELSEWHERE[name])
    if name not in FORMATS:
        raise UsageError(f"unknown format `{name}`", hint=did_you_mean(name, list(FORMATS)) or f"formats: {', '.join(FORMATS)}")
    return FORMATS[name](dtype, _bytes(max_shard_size), data)


def _bytes(text: str) -> int:
    """A size like `5GB` or `500MB` in bytes."""
    from ftcli.errors import UsageError

    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    number = text.strip().upper()
    unit = next((unit for unit in sorted(units, key=len, reverse=True) if number.endswith(unit)), "")
    number = number.removesuffix(unit).strip()
    if not unit or not number.isdecimal() or int(number) == 0:
        raise UsageError(f"--max-shard-size {text} is no size", hint="5GB, 500MB")
    return int(number) * units[unit]


def _default_folder(target: str, to: str) -> Path:
    """`RUN/export-FORMAT` for a run, `NAME-FORMAT` here for anything else."""
    from ftcli.reporting.found_run import is_run

    path = Path(target).expanduser()
    if is_run(path):
        return path / f"export-{to}"
    return Path(f"{target.removeprefix('builtin:').rstrip('/').rpartition('/')[2] or 'model'}-{to}")


def _say(report: ExportReport, note: Callable[[str], None]) -> None:
    for check in report.checks:
        note(check.line())
    note(f"{report.kind}: {report.output} ({report.dtype}, {report.num_bytes / 1e6:.1f} MB)")
    note("next:")
    for command in report.next_commands:
        note(f"  {command}")
