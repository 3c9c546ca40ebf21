"""`ftcli merge RECIPE.yaml`, `ftcli merge RUN`, or `ftcli merge --base BASE --adapter DIR`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    run: Annotated[Path | None, typer.Argument(metavar="RECIPE|RUN", help="A merge recipe (YAML), or a run's folder.")] = None,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Of a recipe: print what would be done, and do nothing.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a recipe: tensors merged at once; one for each processor.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Of a recipe: go on with a merge that was interrupted.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Of a recipe: load the result and run it once.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout; words go to stderr.")] = False,
) -> None:
    """Merge models as a recipe says, or fold an adapter into its base model; with proof."""
    import sys

    is_recipe = run is not None and (run.is_file() or run.suffix in (".yaml", ".yml"))
    others = {"--target": target is not Target.dequantised, "--checkpoint": checkpoint is not None, "--dtype": dtype is not Dtype.auto}
    others |= {"--compare-targets": compare_targets, "--base": base is not None, "--adapter": adapter is not None}
    others |= {"--quantize": quantize is not None, "--device": device != "auto"}
    own = {"--dry-run": dry_run, "--threads": threads is not None, "--resume": resume, "--no-verify": not verify}
    _check_options(is_recipe, others if is_recipe else own)
    if is_recipe:
        assert run is not None
        _merge_recipe(run, output, dry_run, threads, resume, verify, as_json)
        return

    from ftcli.cli.console import print_json
    from ftcli.exporting.merge_run import merge_folder, merge_run
    from ftcli.models.quantisation import Quantization
    from ftcli.reporting.live import Reporter

    _check_usage(run, output, base, adapter, checkpoint, quantize)
    with Reporter(stream=sys.stderr if as_json else None) as reporter:
        how: Any = {"target": target.value, "dtype": dtype.value, "device": device, "compare_targets": compare_targets}
        how["progress"] = reporter
        if run is not None:
            report = merge_run(run, output or run / "merged", checkpoint=checkpoint, **how)
        else:
            stored = None if quantize is None else Quantization(format=quantize.value)
            report = merge_folder(cast("str", base), cast("Path", adapter), cast("Path", output), quantization=stored, **how)
        _say(report, reporter.note)
    if as_json:
        print_json(report.to_json())


def _check_options(is_recipe: bool, given: dict[str, bool]) -> None:
    from ftcli.errors import UsageError

    if wrong := [option for option, is_given in given.items() if is_given]:
        hint = "the recipe says it" if is_recipe else "give a merge recipe: ftcli merge RECIPE.yaml -o OUT"
        raise UsageError(f"{', '.join(wrong)} {'is not for' if is_recipe else 'is only for'} a merge recipe", hint=hint)


def _merge_recipe(
    recipe: Path, output: Path | None, dry_run: bool, threads: int | None, resume: bool, verify: bool, as_json: bool
) -> None:  # fmt: skip
    import os
    import sys

    from ftcli.cli.console import print_json
    from ftcli.cli.merge_special import carry_out_special
    from ftcli.errors import UsageError
    from ftcli.merging.outcome import carry_out_plan, check_output, left_behind, outcome_lines, plan_json, plan_lines
    from ftcli.merging.plan import plan_merge
    from ftcli.merging.recipe import load_merge_recipe
    from ftcli.merging.special import open_special

    if output is None and not dry_run:
        raise UsageError("there is no place for the merged model", hint="ftcli merge RECIPE.yaml -o OUT")
    if output is not None:
        check_output(output)
    if (special := open_special(recipe)) is not None:
        carry_out_special(special, output, dry_run=dry_run, threads=threads, resume=resume, verify=verify, as_json=as_json)
        return
    threads = threads or len(os.sched_getaffinity(0))
    plan = plan_merge(load_merge_recipe(recipe), output, threads=threads)
    if dry_run:
        if as_json:
            print_json(plan_json(plan))
        else:
            print("\n".join(plan_lines(plan)))
        return
    from ftcli.reporting.live import Reporter

    assert output is not None
    with Reporter(stream=sys.stderr if as_json else None) as reporter:
        try:
            outcome = carry_out_plan(plan, output, threads=threads, resume=resume, verify=verify, say=reporter.update)
        finally:
            if (left := left_behind(output)) is not None:
                reporter.note(left)
        for line in outcome_lines(outcome):
            reporter.note(line)
    if as_json:
        print_json(outcome.to_json())


def _check_usage(
    run: Path | None, output: Path | None, base: str | None, adapter: Path | None, checkpoint: str | None, quantize: Stored | None
) -> None:
    from ftcli.errors import UsageError

    usage = "ftcli merge RECIPE.yaml -o OUT, ftcli merge RUN, or ftcli merge --base BASE --adapter DIR -o OUT"
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
