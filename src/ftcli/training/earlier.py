"""What a finished run leaves to one that goes on from it: its base, a sample of what it has seen, and what it has measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.data.buffer import BUFFER_FILE, Kept, Seen, fill_buffer, read_buffer
from ftcli.data.settings import EvaluationSource, TrainSource
from ftcli.data.sources.file import File
from ftcli.errors import Problem, RequestError
from ftcli.recipe.chain import MERGED
from ftcli.recipe.load import load_recipe
from ftcli.recipe.recipe import Recipe
from ftcli.training.folder import RunFolder

if TYPE_CHECKING:
    from ftcli.data.prepare import Progress
    from ftcli.data.store import TreeStore
    from ftcli.training.assemble import DataParts

DETECT_ROWS = 64


@dataclass(frozen=True)
class Earlier:
    """A finished run; its data is put together again when it is asked for."""

    folder: RunFolder
    progress: Progress

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
        """What it has measured, rows that it held out by itself among it, by the names it has measured it by."""
        held_out, measured = self.recipe.data.held_out(), list(self.manifest["summary"]["after"])
        if held_out is not None and not measured:
            return []
        sources = self.recipe.data.evaluation if held_out is None else (held_out,)
        if any(source.source.kind == "self" for source in sources):
            # Another base would write other texts.
            stores = self._data.prepared.evaluation
            sources = tuple(store.entry for store in stores if isinstance(store.entry, EvaluationSource))
        names = measured if len(measured) == len(sources) else [source.name for source in sources]
        return [source.model_copy(update={"name": name, "role": "retained"}) for name, source in zip(names, sources, strict=True)]

    def buffer(self, size: int) -> list[Kept]:
        """A sample of what it and all runs before it were trained on, written into its folder once.

        Raises:
            RequestError: its data cannot be read any more, or is another now.
        """
        from ftcli.training.seen import numbers_seen

        folder = self.folder.path / f"replay-{size}"
        if (folder / BUFFER_FILE).is_file():
            return read_buffer(folder)
        before = self._buffer_before(size)
        known = {kept.source.source for kept in before}
        summary = self.manifest["summary"]
        numbers = numbers_seen(self._data, summary.get("best_step") or summary["steps"])
        own = [
            Seen(_with_format(store), sorted(rows))
            for store, rows in zip(self._data.prepared.train, numbers, strict=True)
            if store.entry.source not in known
        ]
        return fill_buffer(own, before, folder, size, self.recipe.train.seed, f" of {self.recipe.name}")

    def _buffer_before(self, size: int) -> list[Kept]:
        """The buffer that it has replayed, or that it would have where it was told to replay nothing."""
        for source in self.recipe.data.train:
            if isinstance(source.source, File) and source.role == "replay" and (found := read_buffer(Path(source.source.path).parent)):
                return found
        before = self.manifest.get("after")
        return [] if before is None else Earlier(RunFolder(Path(before)), self.progress).buffer(size)


def _with_format(store: TreeStore) -> TrainSource:
    """The source with the format that reads it, which a few rows of it may not tell, and the name it has in the run."""
    from ftcli.data.formats.detect import detect_format

    entry = store.entry
    assert isinstance(entry, TrainSource)
    first = [row for _, row in islice(entry.source.rows(), DETECT_ROWS)]
    layout = entry.format or detect_format(first, store.name, frozenset({store.report.format}))
    return entry.model_copy(update={"format": layout, "name": store.name})
