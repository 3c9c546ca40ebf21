"""The statistics that a recipe names, matched with the tensors that they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ftcli.errors import Problem, RequestError
from ftcli.merging.numbers import STORED
from ftcli.merging.planned import Input
from ftcli.merging.recipe import MergeRecipe, Part
from ftcli.merging.settings import Wrong
from ftcli.merging.stored import StoredTensor, read_header

_LISTED = 3


@dataclass
class Statistics:
    """The statistics files of a recipe."""

    recipe: MergeRecipe
    files: dict[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    misfits: dict[str, list[str]] = field(default_factory=dict)

    def open(self, wrong: Wrong) -> None:
        """Read the headers of all of them."""
        recipe = self.recipe
        for part in (part for module in recipe.modules for piece in module.slices for part in piece.parts):
            if part.statistics is not None and part.statistics not in self.files:
                path = Path(part.statistics).expanduser()
                path = path if path.is_absolute() else recipe.path.resolve().parent / path
                try:
                    self.files[part.statistics] = read_header(path)
                except RequestError as error:
                    wrong(recipe.where((*part.path, "statistics")), error.problems[0].what, None)

    def of_tensor(
        self, parts: Sequence[Part], inputs: Sequence[Input], shapes: Sequence[tuple[int, ...]]
    ) -> tuple[StoredTensor | None, ...]:
        """Each model's statistics of a tensor; none where none of them has any.

        Args:
            shapes: of each model's own tensor; with a merged vocabulary they need not have the same rows.
        """
        kind = self.recipe.method.statistics
        if kind is None:
            return ()
        found = [self.files.get(part.statistics or "", {}).get(item.name) for part, item in zip(parts, inputs, strict=True)]
        if all(tensor is None for tensor in found):
            return ()
        for part, item, tensor, shape in zip(parts, inputs, found, shapes, strict=True):
            expected = shape if kind == "elementwise" else (shape[-1], shape[-1])
            if tensor is None:
                self.missing.setdefault(part.model, []).append(f"`{item.name}`")
            elif tensor.dtype not in STORED:
                self.misfits.setdefault(part.model, []).append(f"`{item.name}` of {tensor.dtype}")
            elif tensor.shape != expected:
                self.misfits.setdefault(part.model, []).append(f"`{item.name}` {list(tensor.shape)}, allowed {list(expected)}")
        return tuple(found)

    def problems(self) -> list[Problem]:
        """What does not fit, in one sentence for each kind of it."""
        found = []
        if self.missing:
            what = f"statistics that other models have are missing: {_listed(self.missing)}"
            found.append(Problem("statistics", what, "gather all of them with the same `ftcli merge-statistics --kind`"))
        if self.misfits:
            what = f"the statistics are not those that `{self.recipe.method.name}` needs: {_listed(self.misfits)}"
            found.append(Problem("statistics", what, f"`ftcli merge-statistics MODEL --kind {self.recipe.method.name}` gathers them"))
        return found


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    words = [f"`{model}`: {name}" for model, members in names.items() for name in members]
    one_of_each = [f"`{model}`: {members[0]}" for model, members in names.items()][:_LISTED]
    return "; ".join(one_of_each) + (f" ... and {len(words) - len(one_of_each)} more" if len(words) > len(one_of_each) else "")
