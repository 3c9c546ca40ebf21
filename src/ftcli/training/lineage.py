"""What a run goes back to: the weights that it and the runs before it began with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ftcli.training.folder import RunFolder

if TYPE_CHECKING:
    from ftcli.recipe.recipe import Recipe


class Beginning(NamedTuple):
    """The weights that a run began with."""

    base: str
    """Fingerprint of its base."""
    trained: str
    """Hash of the first values of what trains."""


def beginning_of(run: Path) -> Beginning | None:
    """Of the run in a folder; None where there is none."""
    manifest = RunFolder(run).manifest()
    found = manifest.get("base_fingerprint"), manifest.get("hashes", {}).get("initial_trainable")
    return None if None in found else Beginning(*map(str, found))


def beginnings_before(recipe: Recipe) -> Iterator[Beginning]:
    """Of all runs before one with this recipe that trained what it goes on to train, the last one first.

    A whole model is gone on with wherever it is the base; an adapter only where `init_from` keeps it: merged, or below another, it is
    not what trains.
    """
    artefact = recipe.method.artefact
    run = _run_before(artefact, recipe.model.base, None if recipe.init_from is None else recipe.init_from.model_dump())
    while run is not None and (found := beginning_of(run)) is not None:
        manifest = RunFolder(run).manifest()
        # a whole model goes back past the adapters that were merged into it, to what they were put on
        is_same = manifest["artefact"] == artefact
        if is_same:
            yield found
        run = _run_before(artefact, manifest["base"], manifest["init_from"] if is_same else None)


def _run_before(artefact: str, base: str | None, init_from: dict[str, Any] | None) -> Path | None:
    places: list[Path] = []
    if init_from is not None and (artefact == "model" or init_from["adapter"] == "keep"):
        path = Path(init_from["path"])
        places = [path, path.parent, path.parent.parent]
    elif init_from is None and artefact == "model" and base is not None:
        places = [Path(base).parent]
    return next((place for place in places if RunFolder(place).resolved_path.is_file()), None)
