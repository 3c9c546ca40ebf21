"""`ftcli eval`: measure models on tasks, compare them with a base, and judge gates."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ftcli.evaluation.evaluate import Change, Evaluated
    from ftcli.evaluation.gates import GateResult
    from ftcli.evaluation.recipe import EvaluationRecipe

app = typer.Typer()

Targets = Annotated[list[str], typer.Argument(help="Runs, checkpoints, adapters, models, builtin:NAME.", show_default=False)]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", "-r", help="The evaluation recipe: tasks and gates.", show_default=False)]
Against = Annotated[str | None, typer.Option("--against", metavar="BASE", help="Compare with this model, row by row.", show_default=False)]
Gates = Annotated[list[str] | None, typer.Option("--gate", help='Such as "orders.exact_match >= 0.9".', show_default=False)]
DataFile = Annotated[Path | None, typer.Option("--data", help="One task without a recipe: a file of rows.", show_default=False)]
Kind = Annotated[str, typer.Option("--kind", help="Kind of task of --data, such as language-modelling.")]
MetricKind = Annotated[str, typer.Option("--metric", help="How answers to --data are compared with their references.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="The first so many rows of every task.", show_default=False)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for results.json, samples and gates.xml.", show_default=False)]
Stages = Annotated[bool, typer.Option("--stages", help="The models are stages of one training, in order: what did each forget?")]
Clean = Annotated[bool, typer.Option("--clean", help="Also the figures of rows that are not in a run's own training data.")]
UserMetrics = Annotated[
    Path | None,
    typer.Option("--metrics", metavar="FILE.py", help="Your own metrics: functions (answer, reference, row).", show_default=False),
]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Run programs that models write, in a sandbox.")]
LmEvalJson = Annotated[
    Path | None, typer.Option("--lm-eval-json", metavar="FOLDER", help="Also write results as lm-eval writes them.", show_default=False)
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Measure again what is kept from before.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command("eval")
def evaluate_targets(
    targets: Targets,
    recipe: RecipeFile = None,
    against: Against = None,
    gate: Gates = None,
    data: DataFile = None,
    kind: Kind = "generation",
    metric: MetricKind = "exact-match",
    limit: Limit = None,
    output: Output = None,
    stages: Stages = False,
    clean: Clean = False,
    metrics: UserMetrics = None,
    allow_code: AllowCode = False,
    lm_eval_json: LmEvalJson = None,
    no_cache: NoCache = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure models on tasks, with intervals; compare them with a base, paired; judge gates (exit 3 if one fails)."""
    from ftcli.cli.console import print_json, words_on_stderr
    from ftcli.errors import GateError, Problem
    from ftcli.evaluation.details import divergence_lines, stage_lines, stages_of
    from ftcli.evaluation.evaluate import changes, divergences, evaluate
    from ftcli.evaluation.gates import judge, parse_gate
    from ftcli.evaluation.user_metrics import load_user_metrics
    from ftcli.reporting.live import Reporter
    from ftcli.reporting.lm_eval_results import write_lm_eval

    asked = _with_clean(_recipe(recipe, data, kind, metric, limit), clean)
    gates = [parse_gate(text) for text in (*asked.gates, *(gate or ()))]
    cache = None if no_cache else _cache_folder()
    own = load_user_metrics(metrics) if metrics is not None else ()
    with words_on_stderr(as_json), Reporter() as reporter:
        models = list(dict.fromkeys([*targets, *([against] if against is not None else [])]))
        options: dict[str, Any] = {"cache": cache, "device": device, "allow_code": allow_code, "user_metrics": own}
        found = {model: evaluate(model, asked.tasks, **options, progress=reporter.update) for model in models}
    base = found.get(against) if against is not None else None
    compared = {target: changes(found[target], base, asked.tasks) for target in targets if base is not None and target != against}
    judged = {
        target: [judge(one, found[target].measured(), None if base is None else base.measured()) for one in gates] for target in targets
    }
    moved = {target: divergences(target, against, asked.tasks, cache=cache, device=device) for target in compared if against is not None}
    order = stages_of(found, targets, base, asked.tasks) if stages else None
    report = _report(found, compared, judged)
    report["divergences"] = {target: {task: figure.to_json() for task, figure in figures.items()} for target, figures in moved.items()}
    report |= {} if order is None else {"stages": order}
    if output is not None:
        _write(output, report, found, judged)
        _write_flips(output, compared, found, base)
    if lm_eval_json is not None:
        write_lm_eval(lm_eval_json, list(found.values()), asked.tasks, datetime.now())
    if as_json:
        print_json(report)
    else:
        _print(found, compared, judged, asked)
        beside = [line for target, figures in moved.items() for line in divergence_lines(target, figures)]
        print("\n".join([*beside, *(stage_lines(order, targets) if order is not None else [])]), end="\n" if beside or order else "")
    failed = [Problem(target, result.line()) for target, results in judged.items() for result in results if not result.passed]
    if failed:
        raise GateError(f"{len(failed)} gate{'s' if len(failed) > 1 else ''} did not hold", failed)


def _cache_folder() -> Path:
    from ftcli.data.cache import default_cache_folder

    return default_cache_folder() / "evaluations"


def _recipe(path: Path | None, data: Path | None, kind: str, metric: str, limit: int | None) -> EvaluationRecipe:
    """The recipe's tasks, or the one that the options describe.

    Raises:
        UsageError: neither or both are given.
    """
    from ftcli.errors import UsageError, did_you_mean
    from ftcli.evaluation.recipe import EvaluationRecipe, load_evaluation_recipe

    if (path is None) == (data is None):
        raise UsageError(
            "`ftcli eval` needs `--recipe FILE` or `--data FILE`", hint="ftcli eval RUN --data test.jsonl --metric exact-match"
        )
    if path is not None:
        recipe = load_evaluation_recipe(path)
        if limit is not None:
            tasks = tuple(task.model_copy(update={"limit": min(limit, task.limit or limit)}) for task in recipe.tasks)
            recipe = recipe.model_copy(update={"tasks": tasks})
        return recipe
    from pydantic import ValidationError

    from ftcli.evaluation.tasks import Task
    from ftcli.metrics import Metric

    assert data is not None
    task: dict[str, Any] = {"name": data.name.split(".")[0], "kind": kind, "source": {"kind": "file", "path": str(data)}, "limit": limit}
    if kind == "generation":
        task["metrics"] = [{"kind": metric}]
    try:
        return EvaluationRecipe.model_validate({"version": 1, "tasks": [task]}, strict=False)
    except ValidationError as error:
        kinds, known = _kinds(Task), _kinds(Metric)
        wrong, allowed = (kind, kinds) if kind not in kinds else (metric, known)
        if wrong not in allowed:
            raise UsageError(
                f"`{wrong}` is no kind of task or metric", hint=did_you_mean(wrong, allowed) or f"kinds: {', '.join(allowed)}"
            ) from None
        first = error.errors()[0]
        missing = ".".join(map(str, first["loc"][3:]))
        raise UsageError(f"--kind {kind} cannot be asked for by options alone: {missing}: {first['msg']}", hint="write a recipe") from None


def _kinds(union: Any) -> list[str]:
    """The kinds of a discriminated union."""
    from typing import get_args

    return [get_args(member.model_fields["kind"].annotation)[0] for member in get_args(get_args(union)[0])]


def _with_clean(recipe: EvaluationRecipe, clean: bool) -> EvaluationRecipe:
    """With `clean`, every task that says nothing of training data is also measured without what stands in the run's own."""
    from ftcli.evaluation.tasks.task import LeakageCheck

    if not clean:
        return recipe
    tasks = tuple(task.model_copy(update={"leakage": task.leakage or LeakageCheck()}) for task in recipe.tasks)
    return recipe.model_copy(update={"tasks": tasks})


def _write_flips(folder: Path, compared: dict[str, list[Change]], found: dict[str, Evaluated], base: Evaluated | None) -> None:
    """For every comparison the rows that were lost and gained, with what both models did to them."""
    from ftcli.evaluation.details import flip_rows
    from ftcli.files import json_text, write_lines

    if base is None:
        return
    places = {target: place for place, target in enumerate(found)}
    for target, listed in compared.items():
        for change in listed:
            rows = flip_rows(change, base.results[change.task], found[target].results[change.task])
            lines = ((json_text(row) + "\n").encode("utf-8", "replace") for row in rows)
            write_lines(folder / f"flips-{change.task}-{places[target]}.jsonl", lines)


def _report(found: dict[str, Evaluated], compared: dict[str, list[Change]], judged: dict[str, list[GateResult]]) -> dict[str, Any]:
    from ftcli.evaluation.details import details_json

    return {
        "models": {
            target: {
                "description": one.description,
                "precision": one.precision,
                "tasks": {
                    name: {
                        "rows": len(result.rows),
                        "figures": {figure: value.to_json() for figure, value in result.figures.items()},
                        "notes": result.notes,
                        **details_json(result),
                        "tokens": result.tokens,
                        "seconds": round(one.seconds[name], 3),
                        "reused": name in one.reused,
                    }
                    for name, result in one.results.items()
                },
            }
            for target, one in found.items()
        },
        "changes": {target: [change.to_json() for change in changes] for target, changes in compared.items()},
        "gates": {target: [result.to_json() for result in results] for target, results in judged.items()},
    }


def _write(folder: Path, report: dict[str, Any], found: dict[str, Evaluated], judged: dict[str, list[GateResult]]) -> None:
    from ftcli.evaluation.gates import junit_xml
    from ftcli.files import json_text, write_json, write_lines, write_text

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", report)
    for place, (target, one) in enumerate(found.items()):
        for task, result in one.results.items():
            lines = ((json_text({"target": target, **row}) + "\n").encode("utf-8", "replace") for row in result.rows)
            write_lines(folder / f"samples-{task}-{place}.jsonl", lines)
    if any(judged.values()):
        write_text(folder / "gates.xml", junit_xml([result for results in judged.values() for result in results], "ftcli eval"))


def _print(
    found: dict[str, Evaluated], compared: dict[str, list[Change]], judged: dict[str, list[GateResult]], asked: EvaluationRecipe
) -> None:
    from ftcli.evaluation.details import change_lines, detail_lines
    from ftcli.evaluation.measurement import main_figure

    for target, one in found.items():
        print(f"{target}: {one.description}, {one.precision}")
        for task in asked.tasks:
            result = one.results[task.name]
            first = main_figure(task, result)
            names = [first, *(name for name in result.figures if name != first)]
            shown = [f"{name} {_interval(result, name)}" for name in names[:4]]
            again = ", kept from before" if task.name in one.reused else ""
            print(f"  {task.name} ({len(result.rows)} rows{again}): {'; '.join(shown)}")
            for note in [*result.notes, *detail_lines(result)]:
                print(f"    {note}")
    for target, listed in compared.items():
        print(f"\n{target} against its base, the same rows, 95 % intervals, p after Holm:")
        for change in listed:
            print(f"  {_change_line(change)}")
            for line in change_lines(change):
                print(f"    {line}")
    for results in judged.values():
        for gate in results:
            print(gate.line())


def _interval(result: Any, name: str) -> str:
    interval = result.figures[name].interval
    return f"{interval.value:.4g} ({interval.low:.4g} to {interval.high:.4g})"


def _change_line(change: Change) -> str:
    found = change.comparison
    word = "no difference shown" if change.adjusted_p >= 0.05 else ("better" if change.is_better else "worse")
    interval = f"{found.difference.value:+.4g} ({found.difference.low:+.4g} to {found.difference.high:+.4g})"
    flips = f"{len(change.gained)} rows better, {len(change.lost)} worse"
    return f"{change.task}.{change.figure}: {interval}, p {change.adjusted_p:.2g}, {word}; {flips}; {found.detectable_text()}"
