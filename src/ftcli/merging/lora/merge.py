"""Adapters in, one adapter out: exact concatenation, low-rank SVD, and every merge of task vectors on the true changes.

Module by module: what each adapter truly adds to the weight is combined, and the result is stored as factors again. What is stored
has alpha = r, so that its scaling is 1 whatever the inputs used, and readers that know one scaling per adapter are right, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ftcli.errors import GateError, Problem, RequestError
from ftcli.merging.lora.adapter import Adapter, Factors, base_tensor, open_adapter
from ftcli.merging.lora.factor import Factored, factored, joined, truncated
from ftcli.merging.lora.stored import StoredTensors, stored_model
from ftcli.merging.lora.write import AdapterParts, write_adapter
from ftcli.merging.methods.registry import METHODS
from ftcli.merging.numbers import Array
from ftcli.merging.pieces import ArrayInputs, Settings
from ftcli.merging.randomness import Randomness, plain_name
from ftcli.models.locate import model_folder

CONCAT, SVD = "lora_concat", "lora_svd"
DENSE = {
    f"lora_{name}": method
    for name, method in METHODS.items()
    if method.base == "required" and method.num_models[1] is None and method.statistics is None
}
"""Merges of task vectors that adapters can be merged by, through their dense changes."""
_NUM_PROBES = 4
# Relative, of products with random vectors: what rounding to each dtype leaves.
_TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class AdapterMerge:
    """What is to be merged, and how."""

    method: str
    adapters: tuple[Adapter, ...]
    settings: Settings
    """Of the method; `weight` and others that each adapter has its own of are tuples."""
    base: str | None
    """The model that the adapters are for; None for the one that they name."""
    rank: int | None = None
    """Largest rank of the result in each module."""
    energy: float | None = None
    """Smallest share of each module's energy that the result keeps."""
    dtype: str = "float32"
    seed: int = 0

    @property
    def weights(self) -> tuple[float, ...]:
        """One for each adapter; 1 for methods that have none."""
        found: tuple[float, ...] = self.settings.get("weight", (1.0,) * len(self.adapters))
        return found

    @cached_property
    def modules(self) -> dict[str, bool]:
        """Every module that any adapter has factors for, and whether it is an embedding."""
        return dict(sorted({module: kind for adapter in self.adapters for module, kind in adapter.modules.items()}.items()))

    @cached_property
    def full_tensors(self) -> list[str]:
        """Every tensor that any adapter holds in full."""
        return sorted({name for adapter in self.adapters for name in adapter.full_tensors})

    @property
    def base_name(self) -> str | None:
        """The base that was given, or that the adapters name."""
        return self.base or next((adapter.base for adapter in self.adapters if adapter.base), None)

    @property
    def reads_base(self) -> bool:
        """Does the result depend on the base's weights?"""
        if any(adapter.needs_base(module) for adapter in self.adapters for module in adapter.modules):
            return True
        return bool(self.full_tensors) and not self._averages_fully()

    def _averages_fully(self) -> bool:
        """Are the whole modules a plain average, in which the base has no part?"""
        everywhere = all(name in adapter.full_tensors for adapter in self.adapters for name in self.full_tensors)
        return self.method in (CONCAT, SVD) and everywhere and abs(sum(self.weights) - 1) < 1e-6

    @cached_property
    def base_tensors(self) -> StoredTensors | None:
        """The base's weights, where they are needed."""
        if not self.reads_base:
            return None
        assert self.base_name is not None
        return stored_model(model_folder(self.base_name))

    def check(self) -> None:
        """Refuse what cannot be merged, from headers and JSON alone.

        Raises:
            RequestError: with every reason.
        """
        problems = [problem for adapter in self.adapters for problem in adapter.problems()]
        problems = problems or [*self._clashes(), *self._refusals()]
        if problems:
            raise RequestError(f"the adapters cannot be merged by `{self.method}`", problems)

    def _clashes(self) -> Iterator[Problem]:
        first: dict[str, tuple[Adapter, tuple[int, ...]]] = {}
        for adapter in self.adapters:
            shapes: dict[str, tuple[int, ...]] = {module: adapter.shape(module) for module in adapter.modules}
            shapes |= {name: adapter.tensors.shape(stored) for name, stored in adapter.full_tensors.items()}
            for name, shape in shapes.items():
                other, expected = first.setdefault(name, (adapter, shape))
                if shape != expected:
                    yield Problem(adapter.name, f"changes `{name}` of shape {shape}, `{other.name}` one of shape {expected}", "one base")
            for module in adapter.modules:
                clash = next((other for other in self.adapters if f"{module}.weight" in other.full_tensors), None)
                if clash is not None:
                    yield Problem(adapter.name, f"has factors for `{module}`, which `{clash.name}` holds in full", "extract-lora first")

    def _refusals(self) -> Iterator[Problem]:
        dora = [adapter for adapter in self.adapters if any(adapter.is_dora(module) for module in adapter.modules)]
        if self.method == CONCAT and dora:
            names = ", ".join(f"`{adapter.name}`" for adapter in dora)
            what = f"DoRA ({names}) scales the rows of the whole weight, which factors beside it cannot do"
            yield Problem("merge_method", what, f"`{SVD}` works on the true change and reports what it loses")
        if not any(self.weights):
            yield Problem("models", "the weights are all 0: the adapter would change nothing", "a weight that is not 0")
        bases = {adapter.base for adapter in self.adapters if adapter.base}
        if self.base is None and len(bases) > 1:
            what = f"the adapters name different bases: {', '.join(sorted(bases))}"
            yield Problem("base_model", what, "if they are the same model, name it: `base_model: ...`")
        if self.reads_base and self.base_name is None:
            yield Problem("base_model", "the true changes of these adapters depend on the base, and none is named", "base_model: MODEL")


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What became of one module."""

    name: str
    rank: int
    energy: float
    """Share of the energy of the true change that is kept, 0..1."""
    total: float
    """That energy: the squared Frobenius norm."""


@dataclass(frozen=True)
class AdapterMergeReport:
    """What was merged, and how near it is to the truth."""

    output: str
    method: str
    modules: tuple[ModuleReport, ...]
    full_tensors: tuple[str, ...]
    error: float
    """Largest relative error of a module's change from the true one, seen on random vectors; what `energy` lost is in it."""
    num_bytes: int

    @property
    def energy(self) -> float:
        """Share of the energy of all changes together that is kept."""
        total = sum(module.total for module in self.modules)
        return 1.0 if total == 0 else sum(module.energy * module.total for module in self.modules) / total

    def line(self) -> str:
        """The report in one line."""
        ranks = sorted(module.rank for module in self.modules)
        words = f"ranks {ranks[0]} to {ranks[-1]}" if ranks and ranks[0] != ranks[-1] else f"rank {ranks[0]}" if ranks else "no factors"
        full = f", {len(self.full_tensors)} tensors in full" if self.full_tensors else ""
        return f"{self.method}: {len(self.modules)} modules, {words}{full}, {self.energy:.4%} of the energy kept, error {self.error:.1e}"

    def to_json(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "output": self.output,
            "method": self.method,
            "energy": self.energy,
            "error": self.error,
            "num_bytes": self.num_bytes,
            "modules": [{"name": m.name, "rank": m.rank, "energy": m.energy} for m in self.modules],
            "full_tensors": list(self.full_tensors),
        }


@dataclass(eq=False)
class _Pass:
    """One pass over the modules."""

    merge: AdapterMerge
    reports: list[ModuleReport] = field(default_factory=list)
    probes: dict[str, tuple[Array, Array, float]] = field(default_factory=dict)
    """Of each module random vectors, what the true change makes of them, and the share of energy that is kept."""

    def tensors(self) -> Iterator[tuple[str, bool, Factored]]:
        for module, is_embedding in self.merge.modules.items():
            result, truth = self._combined(module)
            self._remember(module, result, truth)
            yield module, is_embedding, result

    def _combined(self, module: str) -> tuple[Factored, Callable[[Array], Array]]:
        """The factors of the merged change, and the true change as a function of (n, p) vectors."""
        merge = self.merge
        holders = [(adapter, weight) for adapter, weight in zip(merge.adapters, merge.weights, strict=True) if module in adapter.modules]
        if merge.method not in (CONCAT, SVD) or any(adapter.is_dora(module) for adapter, _ in holders):
            matrix = self._dense(module)
            rank = merge.rank if merge.rank is not None or merge.energy is not None else sum(a.rank(module) for a, _ in holders)
            return factored(matrix, rank, merge.energy, merge.seed), lambda x: matrix @ x
        found = [(adapter.factors(module, merge.base_tensors), weight) for adapter, weight in holders]
        a, b = joined([(part.a, part.b) for part, _ in found], [part.scaling * weight for part, weight in found])
        if merge.method == CONCAT:
            return Factored(a, b, 1.0, _energy(a, b)), lambda x: _true_product(found, x)
        rank = merge.rank if merge.rank is not None or merge.energy is not None else max(adapter.rank(module) for adapter, _ in holders)
        return truncated(a, b, rank, merge.energy), lambda x: _true_product(found, x)

    def _dense(self, module: str) -> Array:
        """``(m, n)``: the adapters' true changes, merged."""
        merge = self.merge
        shape = next(adapter.shape(module) for adapter in merge.adapters if module in adapter.modules)
        deltas = [
            adapter.delta(module, merge.base_tensors) if module in adapter.modules else np.zeros(shape, np.float32)
            for adapter in merge.adapters
        ]
        return merged_array(merge, module, deltas, np.zeros(shape, np.float32))

    def full_tensor(self, name: str) -> Array:
        """A whole module's tensor, merged: base + what the adapters change of it."""
        merge = self.merge
        held = [adapter.tensors[adapter.full_tensors[name]] if name in adapter.full_tensors else None for adapter in merge.adapters]
        if not merge.reads_base:
            return merged_array(merge, name, [array for array in held if array is not None], None)
        assert merge.base_tensors is not None
        base = base_tensor(merge.base_tensors, name)
        return merged_array(merge, name, [base if array is None else array for array in held], base)

    def _remember(self, module: str, result: Factored, truth: Callable[[Array], Array]) -> None:
        x = np.random.default_rng(0).standard_normal((result.a.shape[1], _NUM_PROBES), np.float32)
        self.reports.append(ModuleReport(module, result.rank, result.energy, result.total))
        self.probes[module] = (truth(x), result.b @ (result.a @ x), result.energy)


def merged_array(merge: AdapterMerge, name: str, arrays: list[Array], base: Array | None) -> Array:
    """Whole arrays merged by the method's own formula; concatenation and SVD are weighted sums."""
    method = DENSE.get(merge.method, METHODS["task_arithmetic" if base is not None else "linear"])
    defaults = {parameter.name: parameter.default for parameter in method.parameters}
    settings = {**defaults, **({} if merge.method in DENSE else {"normalize": False}), **merge.settings}
    names = tuple(plain_name(adapter.name) for adapter in merge.adapters)
    inputs = ArrayInputs(arrays, base, Randomness(merge.seed, name, names))
    function = method.merge(inputs, settings)
    return np.concatenate([function(piece) for piece in inputs.pieces()]).reshape(arrays[0].shape)


def merge_adapters(merge: AdapterMerge, output: Path) -> AdapterMergeReport:
    """Merge as `merge` says and write an adapter in PEFT's layout at `output`, read back before it gets its name.

    Raises:
        RequestError: the adapters cannot be merged so.
        GateError: what was written is not what was computed; nothing is left at `output`.
    """
    merge.check()
    work = _Pass(merge)
    parts = AdapterParts(
        base=merge.base_name,
        factors=list(work.tensors()),
        full={name: work.full_tensor(name) for name in merge.full_tensors},
        saved_modules=sorted({name for adapter in merge.adapters for name in adapter.saved_modules}),
        fan_in_fan_out=any(bool(adapter.config.get("fan_in_fan_out")) for adapter in merge.adapters),
        target_modules=_common_targets(merge),
        dtype=merge.dtype,
        like=merge.adapters[0].config,
        extra_files=merge.adapters[0].folder,
    )
    found: list[AdapterMergeReport] = []

    def verify(folder: Path, num_bytes: int) -> dict[str, Any]:
        error = _verified(merge, work, folder)
        found.append(AdapterMergeReport(str(output), merge.method, tuple(work.reports), tuple(merge.full_tensors), error, num_bytes))
        return {"merge": merge.method, "weights": list(merge.weights), "report": found[0].to_json() | {"output": output.name}}

    inputs = {f"{adapter.name}/{path.name}": path for adapter in merge.adapters for path in sorted(adapter.folder.glob("adapter_*"))}
    write_adapter(parts, output, inputs, verify)
    return found[0]


def _verified(merge: AdapterMerge, work: _Pass, folder: Path) -> float:
    """The largest relative error of what the files add, over all modules.

    Raises:
        GateError: a file holds something else than was computed, or is not the exact sum where it should be.
    """
    written = open_adapter("the result", folder)
    tolerance, largest, problems = _TOLERANCE[merge.dtype], 0.0, []
    for module, (truth, computed, energy) in work.probes.items():
        x = np.random.default_rng(0).standard_normal((written.shape(module)[1], _NUM_PROBES), np.float32)
        factors = written.factors(module, None)
        stored = factors.b @ (factors.a @ x) * np.float32(factors.scaling)
        error = _relative(stored, truth)
        if _relative(stored, computed) > tolerance or (energy > 1 - 1e-12 and error > 4 * tolerance) or not np.isfinite(stored).all():
            problems.append(Problem(module, f"relative error {error:.1e} from the adapters' own sum", "report this: it is a bug"))
        largest = max(largest, error)
    if problems:
        raise GateError("the merged adapter is not what its parts add up to", problems)
    return largest


def _relative(found: Array, expected: Array) -> float:
    scale = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / scale if scale > 0 else float(np.linalg.norm(found))


def _true_product(parts: list[tuple[Factors, float]], x: Array) -> Array:
    """``(m, p)``: the sum of weight * scaling * B @ A @ x, in float64 to the end."""
    total = sum(weight * part.scaling * (part.b.astype(np.float64) @ (part.a.astype(np.float64) @ x)) for part, weight in parts)
    return np.asarray(total, np.float32)


def _energy(a: Array, b: Array) -> float:
    """Squared Frobenius norm of B @ A, by the Gram matrices."""
    return float(np.sum((a.astype(np.float64) @ a.T) * (b.astype(np.float64).T @ b)))


def _common_targets(merge: AdapterMerge) -> list[str] | str | None:
    """The adapters' own `target_modules` where all have the same: then they name the same modules of the base."""
    targets = [adapter.config.get("target_modules") for adapter in merge.adapters]
    keys = ("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying")
    plain = not any(adapter.config.get(key) for adapter in merge.adapters for key in keys)
    same = all(_as_set(target) == _as_set(targets[0]) for target in targets)
    return targets[0] if plain and same and targets[0] else None


def _as_set(target: Any) -> Any:
    return frozenset(target) if isinstance(target, list) else target
