"""One run, from a loaded recipe to a proven model: the only place that knows all the parts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.settings import EvaluationSource
from ftcli.errors import InterruptedRun, Problem, RequestError, RunError
from ftcli.evaluation.answers import Question, read_questions, score_answers
from ftcli.evaluation.classification import write_class_report
from ftcli.evaluation.loss import measure_loss
from ftcli.files import new_folder, said_when_disk_is_full, write_text
from ftcli.layout.model import TreeModel, inner_model
from ftcli.models.added_rows import read_rows, rows_in_place, write_rows
from ftcli.models.changes import changes_of
from ftcli.models.extended_tokenizer import TOKENS_FILE
from ftcli.models.fingerprint import note_base
from ftcli.models.generate import generate
from ftcli.reporting.live import Reporter, RunHeader
from ftcli.training.assemble import (
    DataParts,
    ModelParts,
    assemble_data,
    assemble_learner,
    assemble_model,
    count_parameters,
    featured,
    load_base,
    make_accelerator,
    settled,
)
from ftcli.training.branch import progress_at_begin, schedule_of
from ftcli.training.checkpoint import Checkpoints, load_trainable, verified_state
from ftcli.training.folder import RunFolder
from ftcli.training.frozen_cache import CachePlan, plan_frozen_cache
from ftcli.training.hooks import Checkpoint, Evaluate, Log, Metrics, default_save_every
from ftcli.training.init_from import require_same_origin
from ftcli.training.loop import Progress, train
from ftcli.training.manifest import fingerprints, peak_memory_bytes, run_files
from ftcli.training.probe import measured_losses, note_before, rendered_conversation, write_probe
from ftcli.training.proofs import Proof, frozen_tensors, hash_tensors, probe_log_probs, prove_frozen, prove_reloaded, prove_stops
from ftcli.training.record import data_entries, first_manifest, summary_of
from ftcli.training.regularizer_look import look_at_regularizers
from ftcli.training.regularizers import Place
from ftcli.training.resources import held_bytes, require_disk, require_memory
from ftcli.training.signals import StopSignal
from ftcli.training.step import Learner, NonFiniteError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftcli.data.store import TreeStore
    from ftcli.models.generate import Answer
    from ftcli.optim.schedules import Schedule
    from ftcli.recipe.load import LoadedRecipe
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.batches import BatchSource

NUM_STOP_PROMPTS = 4
MAX_STOP_TOKENS = 256


def run_folder(recipe: Recipe) -> RunFolder:
    """Where a recipe's run goes: `output`, or runs/<name> in the current folder."""
    return RunFolder(Path(recipe.output) if recipe.output is not None else Path.cwd() / "runs" / recipe.name)


def run_recipe(loaded: LoadedRecipe, reporter: Reporter, *, resume: bool = False, first_rows: int | None = None) -> dict[str, Any]:
    """Train as the recipe says, prove the result, and leave a run folder.

    Args:
        resume: go on with the run in the folder; with none there, begin it.
        first_rows: read only so many rows of each source, for a smoke run.

    Returns:
        The summary: status, steps, folder, artefact, evaluation before and after, proofs.

    Raises:
        RequestError: something in the request is wrong; nothing was written.
        RunError: the run failed; its checkpoints are there.
        InterruptedRun: a signal stopped it; it can be resumed.
    """
    recipe, folder = loaded.recipe, run_folder(loaded.recipe)
    goes_on = folder.require_fresh_or_same(recipe, resume)
    if goes_on and (summary := folder.manifest().get("summary")) is not None:
        reporter.note(f"{recipe.name} is finished: nothing is left to do")
        finished: dict[str, Any] = summary
        return finished
    if not goes_on:
        look_at_regularizers(recipe, recipe.model.load_tokenizer())
    stop = StopSignal()
    with stop.installed(), ExitStack() as stack:
        accelerator = make_accelerator(recipe, folder.path)
        if not accelerator.is_main_process:
            reporter.silent = True
        with accelerator.main_process_first():
            data = assemble_data(recipe, reporter, first_rows, may_grow=accelerator.num_processes == 1)
        stack.callback(data.close)
        recipe = settled(recipe, data)
        loaded = replace(loaded, recipe=recipe)
        is_restoring = goes_on and bool(Checkpoints(folder.checkpoints_path, recipe.every.keep).steps())
        parts = assemble_model(recipe, data, accelerator, restoring=is_restoring)
        with accelerator.main_process_first():
            data = featured(recipe, data, parts, reporter)
        require_memory(parts.module, accelerator.device, recipe.method.share_at_work(parts.module), held_bytes(recipe, parts.module))
        require_disk(folder.path, parts.module, recipe.every.keep)
        cache_plan = plan_frozen_cache(recipe, data, parts, accelerator, folder.path, reporter.note)
        if accelerator.is_main_process:
            stack.enter_context(folder.locked())
        for note in data.prepared.notes:
            reporter.note(note)
        run = Run(loaded, folder, data, parts, accelerator, reporter, stop, cache_plan=cache_plan)
        if accelerator.is_main_process and not goes_on:
            folder.begin(loaded, first_manifest(recipe, data, parts, accelerator))
            if data.new_tokens is not None:
                write_text(folder.path / TOKENS_FILE, "".join(f"{text}\n" for text in data.new_tokens.texts))
        accelerator.wait_for_everyone()
        try:
            return run.execute(goes_on)
        except InterruptedRun:
            run.note_status("interrupted")
            raise
        except RequestError:
            if goes_on or not accelerator.is_main_process or not folder.take_back():
                run.note_status("failed")
            raise
        except BaseException:
            run.note_status("failed")
            raise


def _rank(recipe: Recipe) -> list[str]:
    rank = getattr(recipe.method, "rank", None)
    return [] if rank is None else [f"rank {rank}"]


def out_of_memory(error: BaseException) -> RunError:
    """The error for a device that is full: what helps without changing the update."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    hint = "halve train.micro_batch_tokens (the update stays the same), or train.gradient_checkpointing: true"
    return RunError(f"out of memory: {first_line}", hint=hint)


@dataclass(slots=True)
class Run:
    """The parts of a run, and what is done with them in order."""

    loaded: LoadedRecipe
    folder: RunFolder
    data: DataParts
    parts: ModelParts
    accelerator: Accelerator
    reporter: Reporter
    stop: StopSignal
    questions: dict[str, list[Question]] = field(default_factory=dict)
    cache_plan: CachePlan | None = None

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def schedule(self) -> Schedule:
        return schedule_of(self.recipe, self.data.order.num_steps)

    def execute(self, goes_on: bool) -> dict[str, Any]:
        """Restore or begin, train, save, prove, report."""
        recipe, parts = self.recipe, self.parts
        began = time.monotonic()
        probe_trees = self.data.probe_trees()
        frozen_before = hash_tensors(frozen_tensors(parts.module))
        if not goes_on:
            before = probe_log_probs(parts.model, probe_trees)
            if self.accelerator.is_main_process:
                note_before(self.folder.path, before)
        recorded = self.folder.manifest().get("hashes", {}).get("initial_trainable") if goes_on else None
        place = Place(self.folder.path, recorded, self.reporter)
        learner, batch_source = assemble_learner(recipe, self.data, parts, self.accelerator, place)
        cache = None if self.cache_plan is None else self.cache_plan.open(frozen_before)
        checkpoints = Checkpoints(self.folder.checkpoints_path, recipe.every.keep)
        metrics = Metrics(self.folder.metrics_path, self.accelerator)
        progress = self._restore(checkpoints, learner, metrics) if goes_on else self._begin(learner)
        self._announce(progress)
        if recipe.trackers:
            self.accelerator.init_trackers(recipe.name, config={"recipe": self.loaded.text})
        evaluate, hooks = self._hooks(learner, metrics, checkpoints, progress.seconds)
        if not checkpoints.steps():
            evaluate.first = progress.step
        evaluate.act(progress)
        self._train(learner, batch_source, progress, hooks)
        if self.recipe.data.mixture.kind == "stream":
            # What is said of the sources was said of their beginnings.
            self.note_in_manifest(repeats=self.data.order.repeats(), data=data_entries(self.data))
        if cache is not None:
            self.reporter.note(cache.line())
            self.note_in_manifest(frozen_cache=cache.to_json())
            cache.remove()
        self._take_best(checkpoints, evaluate, progress)
        summary = self._finish(progress, probe_trees, frozen_before, began)
        if recipe.trackers:
            self.accelerator.end_training()
        return summary

    def _begin(self, learner: Learner) -> Progress:
        return progress_at_begin(self.recipe, learner, self.data.order.num_steps)

    def _restore(self, checkpoints: Checkpoints, learner: Learner, metrics: Metrics) -> Progress:
        steps = checkpoints.steps()
        progress = checkpoints.load(steps[-1], learner) if steps else self._begin(learner)
        metrics.cut(progress.metrics_bytes)
        if not steps and self.accelerator.is_main_process:
            self.folder.samples_path.unlink(missing_ok=True)
            self.folder.scores_path.unlink(missing_ok=True)
        kept, found = self.folder.manifest().get("hashes", {}), fingerprints(self.data)
        changed = [key for key in found if kept.get(key, found[key]) != found[key]]
        if changed:
            problems = [Problem(key, "is not what the run began with") for key in changed]
            raise RequestError(f"cannot resume {self.folder.path}: the data has changed", problems)
        require_same_origin(self.recipe, self.folder.manifest())
        return progress

    def _announce(self, progress: Progress) -> None:
        trainable, total = count_parameters(self.parts.module)
        reports = [store.report for store in self.data.prepared.train]
        self.reporter.start(
            RunHeader(
                name=self.recipe.name,
                folder=str(self.folder.path),
                base=self.recipe.model.base or "random weights",
                method=" ".join([self.recipe.method.kind, *_rank(self.recipe)]),
                num_steps=progress.num_steps,
                global_batch_size=self.recipe.train.global_batch_size,
                layout=f"{self.parts.layout.layout} ({self.parts.layout.reason})",
                device=str(self.accelerator.device),
                trainable_parameters=trainable,
                total_parameters=total,
                sources=tuple((report.name, report.num_examples, report.num_targets) for report in reports),
                first_step=progress.step + 1,
            )
        )
        if (words := self.recipe.method.what_trains(self.parts.module)) is not None:
            self.reporter.note(f"trains {words}")

    def _hooks(self, learner: Learner, metrics: Metrics, checkpoints: Checkpoints, seconds: float) -> tuple[Evaluate, list[Any]]:
        recipe = self.recipe
        names = [store.name for store in self.data.prepared.train]
        log = Log(recipe.every.log, metrics, names, self.parts.lr, self.schedule.factor_at, self.reporter.log, seconds)
        evaluate = Evaluate(
            recipe.every.evaluate, lambda step: self.measure(learner, step), metrics, recipe.train.early_stopping, self.reporter.evaluation
        )
        save_every = default_save_every(recipe.every, self.data.order.num_steps)
        checkpoint = Checkpoint(save_every, checkpoints, learner, metrics, self.stop)
        return evaluate, [log, evaluate, checkpoint] if self.data.prepared.evaluation else [log, checkpoint]

    def _train(self, learner: Learner, batch_source: BatchSource, progress: Progress, hooks: list[Any]) -> None:
        if progress.stop_reason is not None:
            return
        self.stop.is_training = True
        try:
            train(learner, batch_source, self.schedule.factor_at, progress, hooks)
        except NonFiniteError as error:
            rows = [self.data.prepared.train[source].where(index) for source, index in self.data.order.examples_at(error.step)]
            listed = ", ".join(rows[:10]) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
            hint = "a lower train.lr, or train.mixed_precision: bf16 instead of fp16"
            raise RunError(error.summary, [Problem("rows of this step", listed)], hint) from error
        except MemoryError as error:
            raise out_of_memory(error) from error
        except RuntimeError as error:
            # torch.OutOfMemoryError is one; the CPU allocator has only its text.
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            raise out_of_memory(error) from error
        finally:
            self.stop.is_training = False
        if progress.stop_reason == "interrupted":
            raise InterruptedRun(
                f"stopped by {self.stop.name or 'another process'} after step {progress.step} of {progress.num_steps}; all is saved",
                hint="the same command with --resume goes on",
            )

    def _take_best(self, checkpoints: Checkpoints, evaluate: Evaluate, progress: Progress) -> None:
        """With early stopping the result is the best step's weights, measured again with generated answers."""
        if self.recipe.train.early_stopping is None or progress.best_step in (None, progress.step):
            return
        assert progress.best_step is not None
        verified_state(checkpoints.path(progress.best_step))
        load_trainable(self.parts.module, checkpoints.path(progress.best_step))
        self.reporter.note(f"taking the weights of the best step, {progress.best_step}")
        best = Progress(num_steps=progress.best_step, step=progress.best_step)
        evaluate.act(best)

    def measure(self, learner: Learner, step: int) -> dict[str, dict[str, Any]]:
        """What each evaluation source measures now; generated answers before the first and after the last step."""
        is_alone = self.accelerator.num_processes == 1
        results: dict[str, dict[str, Any]] = {}
        recipe = self.recipe
        for store in self.data.prepared.evaluation:
            loss = measure_loss(
                self.accelerator,
                learner.model,
                recipe.objective,
                store,
                layout=self.parts.layout.layout,
                micro_batch_tokens=recipe.train.micro_batch_tokens,
                pad_id=self.data.tokenizer.pad_id or 0,
                # One process alone may leave; several must come to the same reduction.
                is_stopping=self.stop.is_set if is_alone else lambda: False,
                progress=self._shown(f"evaluating {store.name}"),
            )
            results[store.name] = {**loss.to_json(), "role": store.role}
            if loss.scores is not None and loss.labels is not None:
                results[store.name] |= recipe.objective.measures(loss.scores, loss.labels)
                if self.accelerator.is_main_process:
                    write_class_report(self.folder.path, store.name, recipe.objective, loss.scores, loss.labels)
            if step == 0 or step == self.data.order.num_steps:
                results[store.name] |= self._answers(store, step)
        return results

    def _shown(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.reporter.update(done, total, what)

    def _answers(self, store: TreeStore, step: int) -> dict[str, float]:
        """Scores of generated answers, where the source asks for them; the main process generates for all."""
        settings = store.entry.generate if isinstance(store.entry, EvaluationSource) else None
        if settings is None or not self.accelerator.is_main_process:
            return {}
        if store.name not in self.questions:
            self.questions[store.name] = read_questions(self.parts.module, store, self.data.tokenizer, settings.limit)
        rows: list[dict[str, Any]] = []
        model, questions = self.parts.module, self.questions[store.name]
        scores, samples = score_answers(model, self.data.tokenizer, questions, settings, self.reporter, rows.append)
        for path, records in ((self.folder.samples_path, samples), (self.folder.scores_path, rows)):
            with said_when_disk_is_full(path), path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, "source": store.name, **record}, ensure_ascii=False) + "\n" for record in records)
        return scores

    def note_status(self, status: str) -> None:
        """Say in the manifest how the run stands."""
        # On a full disk this cannot be said; what is being raised says why.
        with suppress(RunError):
            self.note_in_manifest(status=status)

    def note_in_manifest(self, **entries: Any) -> None:
        """Put entries into the manifest; the main process does it for all."""
        if self.accelerator.is_main_process:
            self.folder.update_manifest(**entries)

    def _finish(self, progress: Progress, probe_trees: list[Any], frozen_before: str, began: float) -> dict[str, Any]:
        """Save the result under its final name, prove it, and write what people read."""
        summary: dict[str, Any] = {}
        recipe_artefact = self.recipe.method.artefact
        if self.accelerator.is_main_process:
            # A wrapper of its own: accelerate has put the mixed precision of training around the other's forward pass.
            trained = probe_log_probs(TreeModel(self.parts.module), probe_trees)
            self._save()
            prompts, limit = self._stop_prompts()
            answers = generate(self.parts.module, self.data.tokenizer, prompts, max_new_tokens=limit) if prompts else []
            proofs = [
                Proof("layout", True, f"{self.parts.layout.layout}: {self.parts.layout.reason}"),
                *(Proof(change.name, True, change.detail) for change in changes_of(inner_model(self.parts.module))),
                prove_frozen(frozen_before, self.parts.module),
                self._prove_reloaded(trained, probe_trees),
                *([prove_stops(answers, limit)] if answers else []),
            ]
            change = self._write_probe(probe_trees, trained, prompts, answers, limit)
            summary = summary_of(self.recipe, self.data, self.folder, progress, proofs, time.monotonic() - began)
            self.folder.update_manifest(
                steps=progress.step,
                best_step=progress.best_step,
                proofs=summary["proofs"],
                seconds=summary["seconds"],
                total_seconds=summary["total_seconds"],
                mixture=summary["mixture"],
                peak_memory_bytes=peak_memory_bytes(),
                probe_change=change,
            )
            failed = [Problem(proof.name, proof.detail) for proof in proofs if not proof.passed and proof.name != "generation stops"]
            if failed:
                raise RunError("the result is not what was trained", failed)
            # The reports show the run as finished; what makes it so for a resume is the summary, which comes last.
            self.folder.update_manifest(status="finished")
            self._write_reports()
            self.folder.update_manifest(summary=summary, files=run_files(self.folder.path, recipe_artefact))
            self.reporter.finish(summary)
        self.accelerator.wait_for_everyone()
        return summary

    def _save(self) -> None:
        recipe = self.recipe
        with new_folder(self.folder.path / recipe.method.artefact) as partial:
            self.parts.model.use_layout("rows")
            with rows_in_place(self.parts.module):
                recipe.method.save(self.parts.module, partial)
                if recipe.method.artefact == "adapter":
                    write_rows(self.parts.module, recipe.model, partial)
            self.data.tokenizer.save(partial)
            if recipe.method.artefact == "adapter":
                rope = None if recipe.model.rope is None else recipe.model.rope.model_dump()
                note_base(partial, recipe.model.base, self.parts.base_fingerprint, rope)

    def _prove_reloaded(self, trained: Any, probe_trees: list[Any]) -> Proof:
        base = load_base(self.recipe, self.data.tokenizer, self.accelerator.device)
        read_rows(base, self.folder.path / self.recipe.method.artefact)
        module = self.recipe.method.load(base, self.folder.path / self.recipe.method.artefact)
        reloaded = probe_log_probs(TreeModel(module), probe_trees)
        return prove_reloaded(trained, reloaded, inner_model(self.parts.module).dtype)

    def _write_probe(
        self, trees: list[Any], trained: Any, prompts: list[str], answers: list[Answer], limit: int
    ) -> dict[str, float] | None:  # fmt: skip
        """Write what `ftcli verify` will ask again, and say how far training has moved the model."""
        return write_probe(
            self.folder.path,
            trees=trees,
            log_probs=trained,
            losses=measured_losses(
                TreeModel(self.parts.module), self.recipe.objective, self.data.prepared.evaluation, self.data.tokenizer.pad_id or 0
            ),
            conversation=rendered_conversation(self.data.tokenizer),
            answers=answers,
            prompts=prompts,
            max_new_tokens=limit,
        )

    def _stop_prompts(self) -> tuple[list[str], int]:
        """(prompts, most new tokens) to see whether answers end, of data with prompts: texts have no prompt to answer."""
        for store in self.data.prepared.train:
            questions = read_questions(self.parts.module, store, self.data.tokenizer, NUM_STOP_PROMPTS)
            if questions and self.data.tokenizer.stop_ids:
                # Twice the longest reference: an answer that is only longer than most has not failed to stop.
                longest = max(len(self.data.tokenizer.encode(question.reference)[0]) for question in questions)
                limit = min(2 * longest + 16, MAX_STOP_TOKENS)
                return [question.prompt for question in questions], limit
        return [], 0

    def _write_reports(self) -> None:
        from ftcli.reporting.card import write_card
        from ftcli.reporting.plot import plot_losses
        from ftcli.reporting.report import write_report

        plot_losses(self.folder.metrics_path, self.folder.path / "loss.svg")
        write_report(self.folder.path)
        write_card(self.folder.path)
