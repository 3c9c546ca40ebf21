"""`ftcli merge RUN`, or `ftcli merge --base BASE --adapter DIR`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftcli.exporting.merge_run import MergeReport


class Target(StrEnum):
    """What a quantised base becomes."""

    dequantised = "dequantised"
    original = "original"
    requantised = "requantised"


class Dtype(StrEnum):
    """Of the weights written."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Stored(StrEnum):
    """How a base was stored while its adapter was trained."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


def merge(
    run: Annotated[Path | None, typer.Argument(help="The run folder.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The new model folder; the default is RUN/merged.")] = None,
    target: Annotated[
        Target, typer.Option(help="For a quantised base: `dequantised` equals the adapter, the others are measured.")
    ] = Target.dequantised,
    checkpoint: Annotated[str | None, typer.Option(help="Merge a checkpoint instead of the result: best, last, or a step.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights written; `auto` is the base's own.")] = Dtype.auto,
    compare_targets: Annotated[bool, typer.Option("--compare-targets", help="Also measure the other targets of a quantised base.")] = False,
    base: Annotated[str | None, typer.Option(help="Without a run: builtin:NAME, a local folder, or a hub id.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Without a run: the folder of a LoRA adapter in PEFT's layout.")] = None,
    quantize: Annotated[Stored | None, typer.Option(help="Without a run: how the base was stored when the adapter was trained.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Fold an adapter into its base model, and prove that the result is its equal."""
    import sys

    from ftcli.cli.console import print_json
    from ftcli.reporting.live import Reporter

    _check_usage(run, output, base, adapter, checkpoint, quantize)
    with Reporter(stream=sys.stderr if as_json else None) as reporter:
        if run is not None:
            from ftcli.exporting.merge_run import merge_run

            report = merge_run(
                run,
                output or run / "merged",
                target=target.value,
                checkpoint=checkpoint,
                dtype=dtype.value,
                device=device,
                compare_targets=compare_targets,
                progress=reporter,
            )
        else:
            from ftcli.exporting.merge_run import merge_folder
            from ftcli.models.quantisation import Quantization

            assert base is not None
            assert adapter is not None
            assert output is not None
            report = merge_folder(
                base,
                adapter,
                output,
                quantization=None if quantize is None else Quantization(format=quantize.value),
                target=target.value,
                dtype=dtype.value,
                device=device,
                compare_targets=compare_targets,
                progress=reporter,
            )
        _say(report, reporter.note)
    if as_json:
        print_json(report.to_json())


def _check_usage(
    run: Path | None, output: Path | None, base: str | None, adapter: Path | None, checkpoint: str | None, quantize: Stored | None
) -> None:
    from ftcli.errors import UsageError

    usage = "ftcli merge RUN, or ftcli merge --base BASE --adapter DIR -o OUT"
    if run is None and (base is None or adapter is None or output is None):
        raise UsageError("neither a run nor all of --base, --adapter and --output are given", hint=usage)
    if run is not None and (base is not None or adapter is not None or quantize is not None):
        raise UsageError("a run knows its base, its adapter and how it was quantised", hint=usage)
    if run is None and checkpoint is not None:
        raise UsageError("--checkpoint belongs to a run", hint=usage)


def _say(report: MergeReport, note: Callable[[str], None]) -> None:
    note(report.line())
    for name, difference in {report.target: report.difference, **report.targets}.items():
        if report.targets or name != "dequantised":
            note(f"target {name}: {difference.line()}")
    note(f"model folder: {report.output} ({report.dtype})")
    note("next:")
    note(f"  ftcli generate {report.output} 'Once upon a time'")
    note(f"  ftcli chat {report.output}")
