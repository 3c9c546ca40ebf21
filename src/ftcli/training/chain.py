"""Runs the stages of a chain one after the other, each from the last, and says what was learnt and kept over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftcli.data.look import look
from ftcli.errors import Problem, RequestError, UsageError
from ftcli.files import write_json, write_text
from ftcli.recipe.chain import MERGED, STAGES, SUMMARY_FILE, ChainStage, LoadedChain, on_first_base
from ftcli.reporting.stages import write_stages_report
from ftcli.training.regularizer_look import look_at_regularizers
from ftcli.training.run import run_folder, run_recipe
from ftcli.training.stages import Summary, over_stages, report_lines, require_proven

if TYPE_CHECKING:
    from ftcli.reporting.live import Reporter

CHAIN_FILE, REPORT_FILE = "chain.yaml", "report.html"


def run_chain(loaded: LoadedChain, reporter: Reporter, *, resume: bool = False, first_rows: int | None = None) -> Summary:
    """Train every stage that is not finished yet, prove that each began where the last ended, and report over all.

    Args:
        resume: go on with the chain in the folder, in the middle of a stage or between two; with none there, begin it.
        first_rows: of every source, as in a smoke run; all where None.

    Returns:
        name, folder, a summary of each stage, proofs, the matrix of stages and evaluation sources, and what was kept.

    Raises:
        RequestError: something in the request is wrong.
        RunError: a stage failed; what came before it is there.
        InterruptedRun: a signal stopped it; it can be resumed.
        GateError: a stage did not begin where the one before it ended.
    """
    _require_fresh_or_same(loaded, resume)
    _look_at_data(loaded)
    loaded.folder.mkdir(parents=True, exist_ok=True)
    write_text(loaded.folder / CHAIN_FILE, loaded.text)
    reporter.shows_next = False
    summaries: list[Summary] = []
    for index, stage in enumerate(loaded.stages):
        reporter.note(f"\nstage {index + 1} of {len(loaded.stages)}: {stage.name}{_from(stage)}")
        if stage.begin == "merge":
            _merge_before(loaded.stages[index - 1], reporter)
        summaries.append(_run_stage(stage, reporter, first_rows))
        if index > 0:
            # So that a run `--after` this chain knows all stages.
            before = run_folder(loaded.stages[index - 1].loaded.recipe).path
            run_folder(stage.loaded.recipe).update_manifest(after=str(before))
        _write(loaded, summaries)
    found = _write(loaded, summaries)
    reporter.note("\n" + "\n".join(report_lines(found)))
    require_proven(found)
    return found


def _run_stage(stage: ChainStage, reporter: Reporter, first_rows: int | None) -> Summary:
    folder = run_folder(stage.loaded.recipe)
    try:
        return run_recipe(stage.loaded, reporter, resume=True, first_rows=first_rows)
    except RequestError as error:
        is_begun = folder.resolved_path.exists()
        hint = (
            f"remove {folder.path} and what comes after it to begin this stage anew; the stages before it stay" if is_begun else error.hint
        )
        raise type(error)(f"stage `{stage.name}`: {error.summary}", error.problems, hint) from error


def _look_at_data(loaded: LoadedChain) -> None:
    """Read the first rows of every stage: what is wrong with the last one is said before the first is trained."""
    for name, stage in on_first_base(loaded):
        try:
            tokenizer = stage.recipe.model.load_tokenizer()
            look(stage.recipe.data, tokenizer, formats=stage.recipe.objective.formats)
            look_at_regularizers(stage.recipe, tokenizer)
        except RequestError as error:
            raise type(error)(f"stage `{name}`: {error.summary}", error.problems, error.hint) from error


def _from(stage: ChainStage) -> str:
    words = {
        "base": "",
        "model": ", on the model of the stage before",
        "keep": ", with the adapter of the stage before",
        "stack": ", beside the adapter of the stage before",
        "merge": ", on the base with the adapter of the stage before merged into it",
    }
    return words[stage.begin]


def _require_fresh_or_same(loaded: LoadedChain, resume: bool) -> None:
    path = loaded.folder / CHAIN_FILE
    if not path.exists():
        if loaded.folder.is_dir() and any(loaded.folder.iterdir()):
            raise UsageError(f"the folder {loaded.folder} is not empty and holds no chain", hint="choose another `output`")
        return
    if not resume:
        hint = "--resume goes on with it; another `name` or `output` begins anew"
        raise UsageError(f"{loaded.folder} already holds a chain", hint=hint)
    kept = {folder.name for folder in (loaded.folder / STAGES).glob("*") if folder.is_dir()}
    strangers = kept - {run_folder(stage.loaded.recipe).path.name for stage in loaded.stages}
    if strangers:
        problems = [Problem(str(loaded.folder / STAGES / name), "is no stage of this recipe") for name in sorted(strangers)]
        raise RequestError("cannot resume: the stages have changed", problems, hint="undo the change, or give another `name` or `output`")


def _merge_before(previous: ChainStage, reporter: Reporter) -> None:
    from ftcli.exporting.merge_run import merge_run

    folder = run_folder(previous.loaded.recipe).path
    if not (folder / MERGED).is_dir():
        reporter.note(merge_run(folder, folder / MERGED, progress=reporter).line())


def _write(loaded: LoadedChain, summaries: list[Summary]) -> Summary:
    """chain.json and the report, of the stages that are finished so far."""
    stages = [stage.name for stage in loaded.stages[: len(summaries)]]
    found: Summary = {
        "status": "finished" if len(summaries) == len(loaded.stages) else "running",
        "name": loaded.chain.name,
        "folder": str(loaded.folder),
        "stages": [{"begin": stage.begin, **_short(summary)} for stage, summary in zip(loaded.stages, summaries, strict=False)],
        **over_stages(stages, summaries),
    }
    write_json(loaded.folder / SUMMARY_FILE, found)
    runs = [run_folder(stage.loaded.recipe).path for stage in loaded.stages[: len(summaries)]]
    write_stages_report(loaded.folder / REPORT_FILE, loaded.chain.name, found, runs)
    return found


def _short(summary: Summary) -> Summary:
    return {key: summary[key] for key in ("name", "status", "folder", "artefact", "steps", "loss", "seconds", "proofs")}
