"""A search from its recipe to a model folder: plan, measure, choose, write by the engine, measure what was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftcli.errors import Problem, RequestError
from ftcli.files import write_json, write_text
from ftcli.merging.engine import Say
from ftcli.merging.hold import clear, held, is_held
from ftcli.merging.layers import num_layers
from ftcli.merging.methods.registry import METHODS as MERGE_METHODS
from ftcli.merging.outcome import check_output, outcome_lines
from ftcli.merging.search.log import Candidate, Evaluation, EvaluationLog, Judge, fingerprint_of
from ftcli.merging.search.recipe import AnySearch, GreedySoup, LearnedWeights, Search, WiseFt
from ftcli.merging.search.soup import greedy_soup, sweep, with_ends
from ftcli.merging.search.space import Space, search, settings_of
from ftcli.merging.search.written import Document, Layers, linear_document, method_document, planned, write_merge
from ftcli.merging.sources import Source, open_source

if TYPE_CHECKING:
    from ftcli.merging.search.judge import Measurer, MergedModel

LOG_FILE, SUMMARY_FILE, PLOT_FILE = "evaluations.jsonl", "search.json", "search.svg"


@dataclass(frozen=True)
class Found:
    """What a search has chosen."""

    best: Evaluation
    document: Document
    """The merge recipe of it."""
    summary: dict[str, Any]
    lines: tuple[str, ...]
    """For people."""


@dataclass
class _Work:
    """The parts of a search."""

    recipe: GreedySoup | WiseFt | Search | LearnedWeights
    path: Path
    sources: list[Source]
    base: Source | None
    merged: MergedModel
    measurer: Measurer
    evaluate: EvaluationLog
    say: Say

    @property
    def references(self) -> list[str]:
        return [source.reference for source in self.sources]


def run_search(
    recipe: AnySearch,
    text: str,
    path: Path,
    output: Path,
    *,
    threads: int | None = None,
    verify: bool = True,
    say: Say = lambda done, total, what: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Carry out a search and write what it chose at `output`. Run again after a kill, it goes on where it was.

    Args:
        text: the recipe as it was written.
        path: where; relative paths count from its folder.
        note: is told what each evaluation gave.

    Returns:
        The report as JSON has it, with `lines` for people.

    Raises:
        RequestError: the models or the data do not fit.
    """
    check_output(output)
    assert isinstance(recipe, GreedySoup | WiseFt | Search | LearnedWeights)
    work_folder = _work_folder(output)
    with held(work_folder, output):
        check_output(output)
        return _run(recipe, text, path, output, work_folder, threads=threads, verify=verify, say=say, note=note)


def _work_folder(output: Path) -> Path:
    return output.with_name(f".search-{output.name}")


def left_behind(output: Path) -> str | None:
    """What is left of a search that did not come to its end; None where nothing is, or one is at work."""
    folder = _work_folder(output)
    if not (folder / LOG_FILE).is_file() or is_held(folder):
        return None
    return f"`{folder}` keeps what was measured: the same command goes on with it; removing the folder is safe"


def _run(
    recipe: GreedySoup | WiseFt | Search | LearnedWeights,
    text: str,
    path: Path,
    output: Path,
    work_folder: Path,
    *,
    threads: int | None,
    verify: bool,
    say: Say,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """As `run_search`, in a folder of its own."""
    work = _open(recipe, path, work_folder, say, note)
    found = _search(work)
    outcome = write_merge(found.document, path, output, dtype=recipe.dtype, threads=threads, verify=verify, say=say)
    written = _measure_written(work, output)
    summary = {**found.summary, "value": found.best.value, "scores": found.best.scores, "written": written}
    summary |= {"evaluations": len(work.evaluate.evaluations), "measured_now": work.evaluate.num_measured}
    if isinstance(recipe, WiseFt):
        _plot_sweep(work, output / PLOT_FILE)
    shutil.move(work_folder / LOG_FILE, output / LOG_FILE)
    clear(work_folder)
    write_json(output / SUMMARY_FILE, summary)
    write_text(output / "search.yaml", text)
    card = output / "README.md"
    said = [_without_folders(line, [folder for source in work.sources for folder in source.folders]) for line in found.lines]
    table = "\n".join(["## How it was found", "", *(f"- {line}" for line in said), ""])
    write_text(card, card.read_text(encoding="utf-8").rstrip() + "\n\n" + table)
    lines = [*found.lines, f"as written: {_shown(written)}", *outcome_lines(outcome)]
    return {"output": str(output), "merge_method": recipe.merge_method, **summary, "lines": lines}


def plan_search(recipe: AnySearch, path: Path) -> list[str]:
    """What a search would do, in lines; the models and the first rows of the data are looked at, nothing is measured.

    Raises:
        RequestError: the settings, the models or the data do not fit.
    """
    assert isinstance(recipe, GreedySoup | WiseFt | Search | LearnedWeights)
    sources = _look(recipe, path)
    count = 2 * len(sources) - 1 if isinstance(recipe, GreedySoup) else None
    count = len(with_ends(recipe.alphas)) if isinstance(recipe, WiseFt) else count
    count = recipe.search.budget if isinstance(recipe, Search) else count
    words = f"at most {count} evaluations" if count is not None else f"{getattr(recipe, 'steps', 0)} updates of the coefficients"
    weights = ", ".join(source.name or source.source.label() for source in recipe.evaluate.sources)
    return [f"{recipe.merge_method} of {len(sources)} models: {words} of {recipe.evaluate.metric} on {weights}"]


def _look(recipe: GreedySoup | WiseFt | Search | LearnedWeights, path: Path) -> list[Source]:
    """The models, from their headers, after a look at everything that can be wrong before a weight is read.

    Raises:
        RequestError: the settings, the models or the data do not fit.
    """
    from ftcli.merging.search.judge import look_at_data

    _check_space(recipe)
    planned(_first_document(recipe), path, None, recipe.dtype, 1)
    sources = [open_source(reference, path.resolve().parent, to_plan=True) for reference in recipe.models]
    reference = getattr(recipe, "base_model", None)
    base = None if reference is None else open_source(reference, path.resolve().parent, to_plan=True)
    _num_groups(recipe, base or sources[0])
    look_at_data(recipe.evaluate, sources[0])
    return sources


def _first_document(recipe: AnySearch) -> Document:
    """A merge of all models, which must be possible for the search to be."""
    assert isinstance(recipe, GreedySoup | WiseFt | Search | LearnedWeights)
    base = getattr(recipe, "base_model", None)
    models = [*recipe.models, *([base] if base is not None and base not in recipe.models else [])]
    return linear_document(models, [1 / len(models)] * len(models))


def _open(
    recipe: GreedySoup | WiseFt | Search | LearnedWeights, path: Path, work_folder: Path, say: Say, note: Callable[[str], None]
) -> _Work:  # fmt: skip
    from ftcli.merging.search.judge import MergedModel, load_frame, open_measurer

    folder = path.resolve().parent
    _look(recipe, path)
    sources = [open_source(reference, folder) for reference in recipe.models]
    reference = getattr(recipe, "base_model", None)
    base = None if reference is None else open_source(reference, folder)
    say(0, 1, "load")
    module, tokenizer = load_frame(base or sources[0], recipe.evaluate.device, sources[0])
    num_groups = _num_groups(recipe, base or sources[0])
    merged = MergedModel(module, sources, base, num_groups)
    measurer = open_measurer(recipe.evaluate, tokenizer, module)

    def measure(candidate: Candidate) -> dict[str, dict[str, float]]:
        _fill(recipe, merged, candidate)
        return measurer.measure()

    def tell(evaluation: Evaluation, number: int) -> None:
        note(f"evaluation {number}: {_named(evaluation.candidate, recipe.models)}: {_shown(evaluation.scores)}")

    stamps = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for source in merged._all for file in source.files]
    keys = [[store.name, store.role, store.report.cache_key, store.entry.model_dump(mode="json")] for store in measurer.stores]
    fingerprint = fingerprint_of(recipe.model_dump(mode="json", exclude={"dtype"}), stamps, keys)
    log = EvaluationLog(Judge(measure, measurer.value), work_folder / LOG_FILE, fingerprint, tell)
    return _Work(recipe, path, sources, base, merged, measurer, log, say)


def _num_groups(recipe: AnySearch, lead: Source) -> int:
    """How many groups of layers have weights of their own.

    Raises:
        RequestError: more than there are layers.
    """
    num_groups: int = recipe.search.layer_groups if isinstance(recipe, Search) else getattr(recipe, "layer_groups", 1)
    depth = num_layers(lead.config) or 1
    if num_groups > depth:
        key = "search.layer_groups" if isinstance(recipe, Search) else "layer_groups"
        raise RequestError("the search cannot be made", [Problem(key, f"{num_groups} is more than the model's {depth} layers")])
    return num_groups


def _check_space(recipe: AnySearch) -> None:
    """Refuse parameters that the searched method has not.

    Raises:
        RequestError: with every reason.
    """
    if not isinstance(recipe, Search):
        return
    settings, method, problems = recipe.search, MERGE_METHODS[recipe.search.method], []
    if method.base == "required" and recipe.base_model is None:
        problems.append(
            Problem("search.method", f"`{method.name}` compares models with a base, and there is none", "add `base_model: ...`")
        )
    for name, ends in settings.ranges.items():
        parameter = method.parameter(name)
        known = ", ".join(known.name for known in method.parameters)
        if parameter is None:
            problems.append(Problem(f"search.ranges.{name}", f"`{method.name}` has no such parameter", f"parameters: {known}"))
        elif ends[0] >= ends[1]:
            problems.append(Problem(f"search.ranges.{name}", f"found {list(ends)}, allowed: [low, high], low below high"))
        else:
            faults = [fault for end in ends if (fault := parameter.fault(end)) is not None]
            problems += [Problem(f"search.ranges.{name}", fault) for fault in faults[:1]]
    for name, value in settings.fixed.items():
        parameter = method.parameter(name)
        fault = f"`{method.name}` has no such parameter" if parameter is None else parameter.fault(value)
        if fault is None and name == "scope" and value == "global":
            fault = "a search measures merges tensor by tensor, and this one looks at all of them together"
        if fault is not None or name in settings.ranges:
            problems.append(Problem(f"search.fixed.{name}", fault or "varies, too", "leave it out of `ranges`" if fault is None else None))
    if settings.budget < len(recipe.models):
        what = f"{settings.budget} is less than one for each of the {len(recipe.models)} models, which are measured first"
        problems.append(Problem("search.budget", what))
    if problems:
        raise RequestError("the search cannot be made", problems)


def _fill(recipe: AnySearch, merged: MergedModel, candidate: Candidate) -> None:
    """Put the candidate's merge into the model."""
    if "model" in candidate:
        merged.fill_with(int(candidate["model"]))
        return
    method = MERGE_METHODS["linear" if isinstance(recipe, GreedySoup) else _method_of(recipe)]
    number = len(merged.sources)
    merged.fill(method, lambda group: settings_of(method, candidate, number, group), getattr(recipe, "seed", 0))


def _method_of(recipe: AnySearch) -> str:
    """The merge method that a search tries."""
    if isinstance(recipe, Search):
        return recipe.search.method
    return "wise_ft" if isinstance(recipe, WiseFt) else "task_arithmetic"


def _search(work: _Work) -> Found:
    recipe, models = work.recipe, work.references
    if isinstance(recipe, GreedySoup):
        soup = greedy_soup(len(models), work.evaluate)
        weights = cast("list[float]", soup.best.candidate["weight"])
        names = [models[index] for index in soup.chosen]
        singles = [f"{models[index]}: {_shown(soup.singles[index].scores)}" for index in soup.order]
        lines = (f"greedy soup of {len(names)} of {len(models)} models: {', '.join(names)}: {_shown(soup.best.scores)}", *singles)
        summary = {"chosen": names, "order": [models[index] for index in soup.order]}
        return Found(soup.best, linear_document(models, weights), summary, lines)
    if isinstance(recipe, WiseFt):
        points, best = sweep(with_ends(recipe.alphas), work.evaluate)
        rows = [{"alpha": point.candidate["alpha"], "scores": point.scores, "value": point.value} for point in points]
        lines = tuple(f"alpha {row['alpha']:g}: {_shown(cast('Any', row['scores']))}" for row in rows)
        document = method_document("wise_ft", models, recipe.base_model, dict(best.candidate), _layers(work))
        return Found(
            best, document, {"alpha": best.candidate["alpha"], "sweep": rows}, (f"alpha {best.candidate['alpha']:g} is best", *lines)
        )
    if isinstance(recipe, LearnedWeights):
        return _learned(work, recipe)
    settings = recipe.search
    space = Space(MERGE_METHODS[settings.method], len(models), settings.ranges, settings.fixed, settings.layer_groups)
    best = search(space, work.evaluate, algorithm=settings.algorithm, budget=settings.budget, seed=recipe.seed)
    alone = [work.evaluate(candidate) for candidate in space.models()]
    shown = [f"{model}: {_shown(each.scores)}" for model, each in zip(models, alone, strict=True)]
    lines = (f"best of {len(work.evaluate.evaluations)}: {_named(best.candidate, models)}: {_shown(best.scores)}", *shown)
    return Found(best, _document_of(work, settings.method, best.candidate), {"best": dict(best.candidate)}, lines)


def _learned(work: _Work, recipe: LearnedWeights) -> Found:
    from ftcli.merging.search.learned import learn_weights

    learned = learn_weights(
        work.merged,
        work.measurer,
        work.evaluate,
        steps=recipe.steps,
        lr=recipe.lr,
        batch_tokens=recipe.batch_tokens,
        seed=recipe.seed,
        say=work.say,
    )
    best, number = work.evaluate.best(), len(work.sources)
    alone, uniform = work.evaluate.evaluations[:number], work.evaluate.evaluations[number]
    rows = [", ".join(f"{value:.3f}" for value in group) for group in learned.coefficients]
    lines = (
        f"learned weights: {_shown(best.scores)}",
        f"uniform average: {_shown(uniform.scores)}",
        *(f"{model}: {_shown(each.scores)}" for model, each in zip(work.references, alone, strict=True)),
        *(f"layers group {index}: {row}" for index, row in enumerate(rows)),
    )
    summary = {"coefficients": learned.coefficients, "losses": learned.losses, "uniform": uniform.scores}
    return Found(best, _document_of(work, "task_arithmetic", best.candidate), summary, lines)


def _document_of(work: _Work, method: str, candidate: Candidate) -> Document:
    """The merge recipe of a candidate."""
    if "model" in candidate:
        weights = [float(index == candidate["model"]) for index in range(len(work.sources))]
        return linear_document(work.references, weights)
    base = work.base.reference if work.base is not None and MERGE_METHODS[method].base == "required" else None
    document = method_document(method, work.references, base, candidate, _layers(work))
    seed = getattr(work.recipe, "seed", 0)
    return document | ({"seed": seed} if seed else {})


def _layers(work: _Work) -> Layers:
    from ftcli.merging.layers import is_before_layers

    lead = work.base or work.sources[0]
    first = [name for name in lead.tensors if is_before_layers(name) and not any(part.isdecimal() for part in name.split("."))]
    return Layers(num_layers(lead.config) or 1, work.merged.num_groups, first)


def _measure_written(work: _Work, output: Path) -> dict[str, dict[str, float]]:
    """What the files hold, measured: with the rounding to the dtype they are written in."""
    from ftcli.merging.search.judge import MergedModel

    MergedModel(work.merged.module, [open_source(str(output.resolve()), output)], None).fill_with(0)
    return work.measurer.measure()


def _without_folders(line: str, folders: Sequence[str]) -> str:
    """A line that names no folder of this machine but by its last name."""
    for folder in sorted(folders, key=len, reverse=True):
        line = line.replace(folder, Path(folder).name or folder)
    return line


def _named(candidate: Candidate, models: Sequence[str]) -> str:
    if "model" in candidate:
        return str(models[int(candidate["model"])])
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in candidate.items())


def _shown(scores: Mapping[str, Mapping[str, float]]) -> str:
    """What each source measures, in a few words."""
    parts = []
    for name, values in scores.items():
        shown = [key for key in values if key in ("loss", "exact-match", "json-match", "number-match")]
        parts.append(f"{name} " + " ".join(f"{key} {values[key]:.4f}" for key in shown))
    return "; ".join(parts)


def _plot_sweep(work: _Work, path: Path) -> None:
    """Every source's metric along the line from base to model."""
    import matplotlib
    from matplotlib.figure import Figure

    from ftcli.reporting.plot import COLOURS, FAINT, INK

    points = sorted(work.evaluate.evaluations, key=lambda point: float(point.candidate["alpha"]))
    metric = work.measurer.settings.metric
    alphas = [float(point.candidate["alpha"]) for point in points]
    with matplotlib.rc_context({"svg.hashsalt": "ftcli", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for index, store in enumerate(work.measurer.stores):
            values = [point.scores[store.name][metric] for point in points]
            style: Any = (0, (4, 2)) if store.role == "retained" else "-"
            label = f"{store.name} (retained)" if store.role == "retained" else store.name
            axes.plot(alphas, values, color=COLOURS[index % len(COLOURS)], linestyle=style, marker="o", markersize=4, label=label)
        axes.set_xlabel("alpha: 0 is the base, 1 the model", color=INK)
        axes.set_ylabel(metric, color=INK)
        axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": "ftcli"})
