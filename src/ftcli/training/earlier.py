"""What a finished run leaves to one that goes on from it: its base, a sample of what it has seen, and what it has measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.buffer import Buffer, Seen, fill_buffer, read_buffer
from ftcli.data.names import free_name, rows_of
from ftcli.data.settings import EvaluationSource, TrainSource
from ftcli.data.sources.file import File
from ftcli.errors import Problem, RequestError, UsageError
from ftcli.recipe.chain import MERGED
from ftcli.recipe.load import load_recipe
from ftcli.recipe.recipe import Recipe
from ftcli.recipe.same_text import fit_of
from ftcli.training.branch import step_of
from ftcli.training.folder import RunFolder
from ftcli.training.init_from import ARTEFACTS, CHECKPOINTS

if TYPE_CHECKING:
    from ftcli.data.prepare import Progress
    from ftcli.data.store import TreeStore
    from ftcli.training.assemble import DataParts

DETECT_ROWS = 64


@dataclass(frozen=True)
class Earlier:
    """A run that another goes on from; its data is put together again when it is asked for."""

    folder: RunFolder
    progress: Progress
    steps: int | None = None
    """Where another begins at a checkpoint of it: the checkpoint's; None at its result."""

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(self.folder.resolved_path).recipe

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return self.folder.manifest()

    @cached_property
    def _data(self) -> DataParts:
        """What it was trained on and has measured.

        Raises:
            RequestError: it cannot be read any more, or is another now.
        """
        from ftcli.training.assemble import assemble_data
        from ftcli.training.manifest import fingerprints

        data = assemble_data(self.recipe, self.progress)
        kept, found = self.manifest["hashes"], fingerprints(data)
        changed = [key for key in found if key.startswith("data/") and kept.get(key) != found[key]]
        if changed:
            problems = [Problem(key.removeprefix("data/"), "is not what the run was trained on") for key in changed]
            raise RequestError(f"the data of `{self.recipe.name}` has changed", problems, hint="--replay-rows 0 goes on without replay")
        return data

    @cached_property
    def last_step(self) -> int:
        """The step whose weights another begins with."""
        return self.steps or self._result_step

    @property
    def _result_step(self) -> int:
        """The step whose weights its result is: its best where it stops early, else its last."""
        summary = self.manifest.get("summary") or {}
        best = None if self.recipe.train.early_stopping is None else summary.get("best_step")
        found: int = best or summary.get("steps") or self.manifest["num_steps"]
        return found

    @property
    def is_whole(self) -> bool:
        """Whether its result is what another begins with, so that what it measured at its end holds at the other's beginning."""
        return self.manifest.get("summary") is not None and self.last_step == self._result_step

    @cached_property
    def before(self) -> Earlier | None:
        """The run that it has begun from itself: `--after` it, from its adapter or a checkpoint, or on its model.

        Raises:
            UsageError: it came after a run that is not there any more.
        """
        if (after := self.manifest.get("after")) is not None:
            return Earlier(RunFolder(Path(after)), self.progress).required(f", which `{self.folder.path}` came after,")
        path = None if self.recipe.init_from is None else Path(self.recipe.init_from.path)
        if path is not None and path.parent.name == CHECKPOINTS:
            found = Earlier(RunFolder(path.parent.parent), self.progress, step_of(path))
        elif path is not None:
            found = Earlier(RunFolder(path.parent if path.name in ARTEFACTS else path), self.progress)
        else:
            base = Path(self.recipe.model.base or "")
            if base.name not in ("model", MERGED):
                return None
            found = Earlier(RunFolder(base.parent), self.progress)
        return found if found.folder.resolved_path.is_file() else None

    @cached_property
    def lost(self) -> Earlier | None:
        """The run that it began from, but not by `--after`, where that one's data cannot be read any more; nobody was told to keep it."""
        if self.before is None or self.manifest.get("after") is not None:
            return None
        data = self.before.recipe.data
        sources: list[TrainSource | EvaluationSource] = [*data.train, *data.evaluation]
        return None if all(map(_is_there, sources)) else self.before

    def required(self, words: str = "") -> Earlier:
        """It, where it is finished.

        Raises:
            UsageError: it is not, or is no run.
        """
        if self.manifest.get("summary") is not None:
            return self
        what = "is not finished" if self.manifest else "is no run folder"
        hint = "ftcli train --resume goes on with it" if self.manifest else "name the folder that ftcli train has written"
        if words and not self.manifest:
            hint = "move it back to where it was"
        raise UsageError(f"`{self.folder.path}`{words} {what}", hint=hint)

    def bases(self) -> list[Recipe]:
        """Its recipe and those of the runs that made its base, and the base of that base; the last one has the first base of all."""
        found = [self.recipe]
        while (base := found[-1].model.base) is not None:
            run = RunFolder(Path(base).parent)
            if Path(base).name not in ("model", MERGED) or not run.resolved_path.is_file():
                break
            found.append(load_recipe(run.resolved_path).recipe)
        return found

    def evaluation(self) -> list[EvaluationSource]:
        """What it and the runs before it have measured, by the names and with the lengths that they have measured it with."""
        found = self._own_evaluation()
        known, names = set(map(rows_of, found)), [source.name or "" for source in found]
        for source in [] if self.before is None or self.lost else self.before.evaluation():
            if rows_of(source) not in known:
                found.append(source.model_copy(update={"name": free_name(source.name or "", names)}))
        return found

    def formats(self) -> dict[Any, frozenset[str]]:
        """For the rows of each source of `evaluation` the formats of which the run that measured it last could read some."""
        earlier = {} if self.before is None or self.lost else self.before.formats()
        return {**earlier, **{rows_of(source): self.recipe.objective.formats for source in self._own_evaluation()}}

    def _own_evaluation(self) -> list[EvaluationSource]:
        """What it has measured, rows that it held out by itself among it."""
        held_out, measured = self.recipe.data.held_out(), list((self.manifest.get("summary") or {"after": {}})["after"])
        if held_out is not None and not measured:
            return []
        sources = self.recipe.data.evaluation if held_out is None else (held_out,)
        if any(source.source.kind == "self" for source in sources):
            # Another base would write other texts.
            stores = self._data.prepared.evaluation
            sources = tuple(store.entry for store in stores if isinstance(store.entry, EvaluationSource))
        names = measured if len(measured) == len(sources) else [source.name or source.source.label() for source in sources]
        found = []
        for name, source in zip(names, sources, strict=True):
            fit = fit_of(source, self.recipe)
            lengths = {"max_length": fit.max_length, "on_overflow": fit.on_overflow}
            found.append(source.model_copy(update={**lengths, "name": name, "role": "retained"}))
        return found

    def buffer(self, size: int) -> Buffer:
        """A sample of what it and all runs before it were trained on, written into its folder once.

        Raises:
            RequestError: its data cannot be read any more, or is another now.
        """
        folder = self.folder.path / (f"replay-{size}" if self.steps is None else f"replay-{size}-of-step-{self.steps:06d}")
        if (found := read_buffer(folder)) is not None:
            return found
        before = self._buffer_before(size)
        return fill_buffer(self._seen(before), before, folder, size, self.recipe.train.seed, f" of {self.recipe.name}")

    def _seen(self, before: Buffer | None) -> list[Seen]:
        """What it was trained on, but for the buffer before; a branch begins behind its trunk."""
        from ftcli.training.seen import drawn, rows_of

        known = [] if before is None else [kept.source.source for kept in before.sources]
        begin = self.recipe.init_from
        first = step_of(Path(begin.path)) + 1 if begin is not None and begin.continues else 1

        def rows(store: TreeStore, seen: Any) -> Iterator[dict[str, Any]]:
            return (row for _, row in rows_of(store, seen))

        seen = drawn(self._data, first, self.last_step)
        parts = zip(self._data.prepared.train, seen, strict=True)
        return [Seen(_with_format(store), rows(store, of_store)) for store, of_store in parts if store.entry.source not in known]

    def _buffer_before(self, size: int) -> Buffer | None:
        """The buffer that it has replayed, or that it would have where it was told to replay nothing."""
        for source in self.recipe.data.train:
            if isinstance(source.source, File) and source.role == "replay" and (found := read_buffer(Path(source.source.path).parent)):
                return found
        return None if self.before is None or self.lost else self.before.buffer(size)


def _is_there(source: TrainSource | EvaluationSource) -> bool:
    """Whether its first row can be read; what a base writes itself is written again."""
    if source.source.kind == "self":
        return True
    try:
        return next(source.source.rows(), None) is not None
    except RequestError:
        return False


def _with_format(store: TreeStore) -> TrainSource:
    """The source with the format that reads it, which a few rows of it may not tell, and the name it has in the run."""
    from ftcli.data.formats.detect import detect_format

    entry = store.entry
    assert isinstance(entry, TrainSource)
    first = [row for _, row in islice(entry.source.rows(), DETECT_ROWS)]
    layout = entry.format or detect_format(first, store.name, frozenset({store.report.format}))
    return entry.model_copy(update={"format": layout, "name": store.name})
