"""The run folder: who may write to it, what it says of itself, and whether a recipe may go on in it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError, UsageError
from ftcli.files import recover, write_json, write_text

if TYPE_CHECKING:
    from ftcli.recipe.load import LoadedRecipe
    from ftcli.recipe.recipe import Recipe


LOCK = ".lock"
BEGUN = ("recipe.yaml", "manifest.json", "recipe.schema.json")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def resolved_path(self) -> Path:
        return self.path / "recipe.resolved.yaml"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples_path(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def scores_path(self) -> Path:
        return self.path / "scores.jsonl"

    def manifest(self) -> dict[str, Any]:
        """What the run says of itself; empty if there is no run."""
        if not self.manifest_path.exists():
            return {}
        manifest: dict[str, Any] = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        return manifest

    def update_manifest(self, **values: Any) -> None:
        write_json(self.manifest_path, {**self.manifest(), **values})

    def require_fresh_or_same(self, recipe: Recipe, resume: bool) -> bool:
        """Whether there is a run here to go on with.

        Raises:
            UsageError: a run is here and going on was not asked for, or no folder can be made here.
            RequestError: the run is one of another recipe; lists the differences.
        """
        self._require_place()
        if not self.resolved_path.exists():
            # What a run that was killed while it began has left is no stranger's.
            strangers = [path.name for path in self.path.glob("*") if not path.name.startswith(".") and path.name not in BEGUN]
            if strangers:
                raise UsageError(f"the run folder {self.path} is not empty and holds no run", hint="choose another `output`")
            return False
        if not resume:
            status = self.manifest().get("status", "unknown")
            raise UsageError(
                f"{self.path} already holds a run (status: {status})",
                hint="--resume goes on with it; another `name` or `output` begins anew",
            )
        from ftcli.recipe.load import load_recipe
        from ftcli.recipe.write import recipe_difference

        begun = load_recipe(self.resolved_path).recipe
        found = {"objective": recipe.objective.settled_as(begun.objective), "model": recipe.model.settled_as(begun.model)}
        difference = recipe_difference(begun, recipe.model_copy(update=found))
        if difference:
            problems = [Problem("", line) for line in difference]
            raise RequestError(
                f"cannot resume {self.path}: the recipe has changed", problems, hint="undo the change, or give another `name` or `output`"
            )
        return True

    def _require_place(self) -> None:
        existing = self.path
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise UsageError(f"the run folder {self.path} cannot be made: {existing} is a file", hint="choose another `output`")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"the run folder {self.path} cannot be written: no permission in {existing}", hint="choose another `output`")

    def begin(self, loaded: LoadedRecipe, manifest: dict[str, Any]) -> None:
        """Write what is known before the first step; recipe.resolved.yaml comes last and makes the folder a run."""
        from ftcli.recipe.schema import SCHEMA_FILE, json_schema
        from ftcli.recipe.write import resolved_yaml

        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "recipe.yaml", loaded.text)
        # The first line of recipe.resolved.yaml names it: what is edited from there is checked while it is typed.
        write_json(self.path / SCHEMA_FILE, json_schema())
        write_json(self.manifest_path, manifest)
        write_text(self.resolved_path, resolved_yaml(loaded.recipe))

    def take_back(self) -> bool:
        """Remove a run that was refused before it measured anything, so that the recipe, put right, begins here; False if it did."""
        if self.metrics_path.exists() or self.checkpoints_path.exists():
            return False
        for path in self.path.iterdir():
            if path.is_file() and (path.name == LOCK or not path.name.startswith(".")):
                path.unlink()
        with suppress(OSError):  # something of someone else's is in it
            self.path.rmdir()
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this folder.

        Raises:
            UsageError: another process is training here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is training in {self.path}") from None
            for folder in (self.path, self.checkpoints_path):
                recover(folder)
            yield
