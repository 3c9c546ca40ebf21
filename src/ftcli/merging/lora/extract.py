"""A LoRA adapter from two models: what one changes of the other, as low-rank factors where it can be, in full where it cannot.

Linear layers get the leading part of the SVD of their change, both factors with the square roots of the singular values. Norms,
embeddings, heads, layers whose bias changes, and whatever else is no matrix product are kept whole in `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftcli.errors import Problem, RequestError
from ftcli.merging.layers import is_buffer
from ftcli.merging.lora.factor import Factored, factored
from ftcli.merging.lora.stored import StoredTensors, name_in_checkpoint
from ftcli.merging.lora.write import AdapterParts, write_adapter
from ftcli.merging.tied_head import are_same

_LISTED = 5


@dataclass(frozen=True)
class Anatomy:
    """What a model's architecture says of its parameters."""

    linear: Mapping[str, bool]
    """Every layer that LoRA can change by the name of its module, and whether its weight is stored as (in, out)."""
    parameters: tuple[str, ...]
    """Every parameter by its name; a tied one once."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """The other names of tied parameters, and the name in `parameters`."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was found in one linear layer."""

    name: str
    rank: int
    energy: float
    """Share of the change's energy that the factors hold, 0..1."""
    total: float
    """That energy."""


@dataclass(frozen=True)
class ExtractReport:
    """What was extracted."""

    output: str
    modules: tuple[Extracted, ...]
    full_modules: tuple[str, ...]
    unchanged: int
    """Linear layers that are the same in both models."""
    num_bytes: int

    @property
    def energy(self) -> float:
        """Share of the energy of all linear layers' changes that is held."""
        total = sum(module.total for module in self.modules)
        return 1.0 if total == 0 else sum(module.energy * module.total for module in self.modules) / total

    def line(self) -> str:
        """The report in one line."""
        ranks = sorted(module.rank for module in self.modules)
        words = f"ranks {ranks[0]} to {ranks[-1]} (median {ranks[len(ranks) // 2]})" if ranks else "none changed"
        words = f"rank {ranks[0]}" if ranks and ranks[0] == ranks[-1] else words
        full = f", in full: {', '.join(self.full_modules[:_LISTED])}" if self.full_modules else ""
        more = f" and {len(self.full_modules) - _LISTED} more" if len(self.full_modules) > _LISTED else ""
        return f"{len(self.modules)} linear layers, {words}, {self.energy:.4%} of the energy of their changes{full}{more}"

    def to_json(self) -> dict[str, Any]:
        """The report as JSON has it."""
        modules = [{"name": module.name, "rank": module.rank, "energy": module.energy} for module in self.modules]
        return {
            "output": self.output,
            "energy": self.energy,
            "modules": modules,
            "full_modules": list(self.full_modules),
            "unchanged": self.unchanged,
            "num_bytes": self.num_bytes,
        }


@dataclass(frozen=True)
class Extraction:
    """Two models of one architecture, and how much of their difference to keep."""

    tuned: StoredTensors
    base: StoredTensors
    anatomy: Anatomy
    rank: int | None = None
    energy: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse models that differ in more than numbers, from their headers alone.

        Raises:
            RequestError: with every reason.
        """
        problems = []
        for name in self.anatomy.parameters:
            stored, expected = (name_in_checkpoint(tensors, name) for tensors in (self.tuned, self.base))
            if stored is None or expected is None:
                who = "neither model's" if stored is expected else "the tuned model's" if stored is None else "the base's"
                problems.append(Problem(name, f"is not in {who} weights", "load the model with transformers and save it again"))
            elif self.tuned.shape(stored) != self.base.shape(expected):
                what = f"has shape {self.tuned.shape(stored)} in the tuned model, {self.base.shape(expected)} in the base"
                is_rows = self.tuned.shape(stored)[1:] == self.base.shape(expected)[1:]
                problems.append(Problem(name, what, "give the base the same vocabulary" if is_rows else "models of one architecture"))
        for other, name in self.anatomy.tied.items():
            found = name_in_checkpoint(self.tuned, other)
            if found is not None and found != name and not np.array_equal(self.tuned[found], self._pair(name)[0]):
                hint = "set `tie_word_embeddings: false` in the base"
                problems.append(Problem(other, "is tied in the base and not in the tuned model", hint))
        problems += self._left_over()
        if problems:
            more = [Problem("", f"... and {len(problems) - _LISTED} more")] if len(problems) > _LISTED else []
            raise RequestError("an adapter cannot be extracted", [*problems[:_LISTED], *more])

    def _left_over(self) -> Iterator[Problem]:
        """Tensors of the tuned model that are no parameter of the base: an adapter would leave out what they do."""
        known = {name_in_checkpoint(self.tuned, name) for name in (*self.anatomy.parameters, *self.anatomy.tied)}
        extra = [name for name in self.tuned.entries if name not in known and not is_buffer(name)]
        unknown = [name for name in extra if name not in self.base.entries]
        changed = [name for name in extra if name in self.base.entries and not are_same(self.tuned.entries[name], self.base.entries[name])]
        hint = "models of one architecture, with as many layers"
        for names, what in (
            (unknown, "is in the tuned model only"),
            (changed, "differs, and is no parameter that an adapter could change"),
        ):
            if names:
                yield Problem(names[0], what + (f", and so are {len(names) - 1} more tensors" if len(names) > 1 else ""), hint)

    def _pair(self, name: str) -> tuple[Any, Any]:
        """A parameter in the tuned model and in the base.

        Raises:
            RequestError: its numbers are not finite.
        """
        found = [tensors[str(name_in_checkpoint(tensors, name))] for tensors in (self.tuned, self.base)]
        for array, whose in zip(found, ("the tuned model", "the base"), strict=True):
            if not np.isfinite(array).all():
                problem = Problem(name, f"holds NaN or infinite numbers in {whose}", "extract from weights that are finite")
                raise RequestError("an adapter cannot be extracted", [problem])
        return found[0], found[1]

    def changed_modules(self) -> list[str]:
        """Modules that must be kept whole: those with a changed parameter that no factors can change."""
        found: dict[str, None] = {}
        for name in self.anatomy.parameters:
            module, _, last = name.rpartition(".")
            if module in self.anatomy.linear and last == "weight":
                continue
            tuned, base = self._pair(name)
            if not np.array_equal(tuned, base):
                found[module] = None
                found |= {other.rpartition(".")[0]: None for other, first in self.anatomy.tied.items() if first == name}
        return list(found)

    def factors(self, module: str) -> Factored | None:
        """The factors of a linear layer's change; None where nothing changes."""
        tuned, base = self._pair(f"{module}.weight")
        if np.array_equal(tuned, base):
            return None
        change = tuned - base
        return factored(np.ascontiguousarray(change.T) if self.anatomy.linear[module] else change, self.rank, self.energy, self.seed)

    def full_tensors(self, modules: Sequence[str]) -> dict[str, Any]:
        """Every parameter of some modules of the tuned model."""
        names = [*self.anatomy.parameters, *self.anatomy.tied]
        wanted = [name for name in names if name.rpartition(".")[0] in modules]
        return {name: self._pair(self.anatomy.tied.get(name, name))[0] for name in wanted}


def extract_lora(
    extraction: Extraction, output: Path, *, base: str, inputs: Mapping[str, Path], dtype: str = "float32", tokenizer: Path | None = None
) -> ExtractReport:
    """Write the adapter that turns the base into the tuned model at `output`.

    Args:
        base: what the adapter is to call its base.
        inputs: the files of both models, for the manifest.
        tokenizer: a folder whose tokenizer comes along.

    Raises:
        RequestError: the models do not fit each other, or are the same.
    """
    extraction.check()
    whole = extraction.changed_modules()
    found: list[tuple[str, bool, Factored]] = []
    unchanged = 0
    for module in extraction.anatomy.linear:
        result = None if module in whole else extraction.factors(module)
        if result is not None:
            found.append((module, False, result))
        elif module not in whole:
            unchanged += 1
    if not found and not whole:
        raise RequestError("there is nothing to extract", [Problem("", "the two models have the same weights")])
    parts = AdapterParts(
        base=base,
        factors=found,
        full=extraction.full_tensors(whole),
        saved_modules=whole,
        fan_in_fan_out=any(extraction.anatomy.linear.values()),
        dtype=dtype,
        extra_files=tokenizer,
    )
    reports: list[ExtractReport] = []
    modules = tuple(Extracted(name, result.rank, result.energy, result.total) for name, _, result in found)

    def note(folder: Path, num_bytes: int) -> dict[str, Any]:
        reports.append(ExtractReport(str(output), modules, tuple(whole), unchanged, num_bytes))
        settings = {"rank": extraction.rank, "energy": extraction.energy}
        return {"extracted": settings, "kept_energy": reports[0].energy, "report": reports[0].to_json() | {"output": output.name}}

    write_adapter(parts, output, inputs, note, kind="extract")
    return reports[0]
