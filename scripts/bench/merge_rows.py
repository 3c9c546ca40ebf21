"""Every merge that merge_methods.py makes, as merge recipes; the label of each begins with its method's registered name.

Methods of three models take all three fine-tunes at once. Methods of two are folded: the second task's model goes into the first's,
then the third's into the result, with settings that give each a third where the method has such a setting. Methods of one model and the
base take the first task's model. A registered method without a row is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Document = dict[str, Any]
WRITTEN_AS = {"dtype": "float32"}
"""As the fine-tunes are: a base in bfloat16 would round the small changes of a merge away."""
FULL, LORA, IA3 = "full", "lora", "ia3"
OF = {
    "full": FULL, "two or one": FULL, "statistics": FULL, "looked for": FULL, "lora": LORA, "ia3": IA3,
}  # fmt: skip
"""Every group of rows, and whose fine-tunings they merge."""
EXAMPLES = 64
"""Training rows of each task that statistics are gathered on."""
NEAR = 0.005
"""Largest change of a weight by nearswap: about half of what lies between two of these models in the median."""
_HALF = {"weight": 0.5}
_SPARSE = {"density": 0.5}
_MOST = {"density": 0.8}

SETTINGS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "linear": [("", {"weight": 1.0})],
    "karcher": [("", {})],
    "task_arithmetic": [("weight 0.5", _HALF), ("weight 1", {"weight": 1.0})],
    "ties": [("density 0.5", {"weight": 1.0, **_SPARSE}), ("density 0.5, lambda 1.5", {"weight": 1.0, **_SPARSE, "lambda": 1.5})],
    "dare_linear": [("weight 0.5, density 0.5", _HALF | _SPARSE)],
    "dare_ties": [("weight 0.5, density 0.5", _HALF | _SPARSE)],
    "della_linear": [("weight 0.5, density 0.5", _HALF | _SPARSE)],
    "della": [("density 0.5", {"weight": 1.0, **_SPARSE})],
    "breadcrumbs": [("weight 0.5, density 0.8", _HALF | _MOST)],
    "breadcrumbs_ties": [("weight 0.5, density 0.8", _HALF | _MOST), ("weight 1, density 0.8", {"weight": 1.0, **_MOST})],
    "sce": [("select_topk 0.5", {"select_topk": 0.5}), ("select_topk 1", {})],
    "model_stock": [("", {}), ("filter_wise", {"filter_wise": True})],
    "ram": [("", {})],
    "ramplus_tl": [("", {})],
}
"""Of methods that take all models at once: what a label says, and the parameters. Adapters are merged with the first of each."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    name: str
    documents: tuple[tuple[Path, Document], ...]
    """Merge recipes in the order in which they are carried out, each with the place of its result."""
    measured: tuple[Path, ...]
    """The result; or one for each task, each measured on its own."""

    @property
    def methods(self) -> set[str]:
        return {str(document["merge_method"]) for _, document in self.documents}


@dataclass(frozen=True)
class World:
    """The places of what is merged; nothing need be there yet."""

    base: str
    folder: Path
    tasks: tuple[str, ...]
    num_layers: int
    evaluation: Document
    """The `evaluate` section on the validation halves."""

    def run(self, task: str, kind: str = FULL) -> Path:
        return self.folder / f"{task}-{kind}"

    def runs(self, kind: str = FULL) -> list[str]:
        return [str(self.run(task, kind)) for task in self.tasks]

    def statistics(self, task: str, kind: str) -> Path:
        return self.folder / f"{task}-{kind}.safetensors"

    def place(self, name: str, part: str = "") -> Path:
        return self.folder / f"merged-{slug(name)}{part}"

    def row(self, group: str, name: str, document: Document) -> Row:
        """A row of one merge."""
        place = self.place(name)
        return Row(group, name, ((place, document | WRITTEN_AS),), (place,))


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in name).split())


def titled(method: str, label: str) -> str:
    return f"{method}, {label}" if label else method


def registered() -> list[str]:
    """Every merge method that a recipe may name."""
    from ftcli.merging.lora.recipe import METHODS as OF_ADAPTERS
    from ftcli.merging.methods.registry import METHODS as OF_MODELS
    from ftcli.merging.special import SEARCHES

    return [*OF_MODELS, *OF_ADAPTERS, *SEARCHES]


def all_rows(world: World) -> list[Row]:
    """Every row.

    Raises:
        SystemExit: a registered method has none, or two rows have one place.
    """
    rows = [*_whole(world), *_with_statistics(world), *_pairs(world), *_adapters(world), *_looked_for(world)]
    missing = sorted(set(registered()) - {method for row in rows for method in row.methods})
    if missing:
        raise SystemExit(f"registered merge methods without a row in scripts/bench/merge_rows.py: {', '.join(missing)}")
    places = [place for row in rows for place, _ in row.documents]
    doubled = sorted({str(place) for place in places if places.count(place) > 1})
    if doubled:
        raise SystemExit(f"two merges would be written at one place: {', '.join(doubled)}")
    return rows


def _whole(world: World) -> Iterator[Row]:
    from ftcli.merging.methods.registry import METHODS

    for method, variants in SETTINGS.items():
        base = {"base_model": world.base} if METHODS[method].base == "required" else {}
        for label, given in variants:
            document = {"merge_method": method, **base, "models": _models(world.runs()), "parameters": given}
            yield world.row("full", titled(method, label), document)
    multislerp = {"merge_method": "multislerp", "models": _models(world.runs()), "parameters": {"weight": 1.0}}
    yield world.row("full", "multislerp, of the weights", multislerp)
    yield world.row("full", "multislerp, of the changes", multislerp | {"base_model": world.base})
    half = {"merge_method": "linear", "base_model": world.base, "models": _models(world.runs()), "parameters": {"weight": 1.0}}
    yield world.row("full", "linear, then half of each layer's tensors reset", half | {"reset": {"fraction": 0.5, "unit": "category"}})
    bounds = [round(share * world.num_layers / len(world.tasks)) for share in range(len(world.tasks) + 1)]
    slices = [
        {"sources": [{"model": run, "layer_range": [first, last]}]}
        for run, first, last in zip(world.runs(), bounds, bounds[1:], strict=False)
    ]
    yield world.row("full", "passthrough, a third of the layers of each", {"merge_method": "passthrough", "slices": slices})


def _models(references: list[str]) -> list[Document]:
    return [{"model": reference} for reference in references]


def _with_statistics(world: World) -> Iterator[Row]:
    def row(method: str, label: str, weights: Sequence[float]) -> Row:
        models = [
            {"model": str(world.run(task)), "statistics": str(world.statistics(task, method)), "parameters": {"weight": weight}}
            for task, weight in zip(world.tasks, weights, strict=True)
        ]
        return world.row("statistics", f"{method}, {label}", {"merge_method": method, "models": models})

    even = [1.0] * len(world.tasks)
    yield row("fisher", f"{EXAMPLES} examples of each", even)
    shares = [1 / _fisher_total(world.statistics(task, "fisher")) for task in world.tasks]
    yield row("fisher", "each model's sum made equal", [share / sum(shares) for share in shares])
    yield row("regmean", f"{EXAMPLES} examples of each", even)


def _fisher_total(path: Path) -> float:
    """The sum of a model's statistics; 1 while they are not gathered."""
    if not path.is_file():
        return 1.0
    from safetensors.numpy import load_file

    return float(sum(tensor.sum(dtype="float64") for tensor in load_file(path).values()))


def _pairs(world: World) -> Iterator[Row]:
    def from_first(name: str, parameters: Mapping[int, Document]) -> Row:
        """The first task's model is the base of the second's, the result of that the base of the third's."""
        method = name.partition(",")[0]
        return _folded(
            world,
            f"{name}, folded pairwise",
            lambda left, right, step: {
                "merge_method": method,
                "base_model": left,
                "models": _models([right]),
                "parameters": parameters[step],
            },
        )

    yield from_first("slerp", {1: {"t": 0.5}, 2: {"t": 1 / 3}})
    yield _folded(
        world,
        "nuslerp, of the changes, folded pairwise",
        lambda left, right, step: {
            "merge_method": "nuslerp",
            "base_model": world.base,
            "models": [{"model": left, "parameters": {"weight": float(step)}}, {"model": right, "parameters": {"weight": 1.0}}],
        },
    )
    yield from_first(f"nearswap, t {NEAR}", {1: {"t": NEAR}, 2: {"t": NEAR}})
    yield from_first("arcee_fusion", {1: {}, 2: {}})
    first = world.tasks[0]
    document = {
        "merge_method": "wise_ft",
        "base_model": world.base,
        "models": _models([str(world.run(first))]),
        "parameters": {"alpha": 0.5},
    }
    yield world.row("two or one", f"wise_ft, alpha 0.5, {first} alone", document)


def _folded(world: World, name: str, document: Callable[[str, str, int], Document]) -> Row:
    """Models merged two at a time, in the order of the tasks.

    Args:
        document: the recipe, of what there is, the next model, and how many models are in the first.
    """
    left, steps = world.runs()[0], []
    for step, right in enumerate(world.runs()[1:], 1):
        place = world.place(name, "" if step == len(world.tasks) - 1 else f"-{step}")
        steps.append((place, document(left, right, step) | WRITTEN_AS))
        left = str(place)
    return Row("two or one", name, tuple(steps), (steps[-1][0],))


def _adapters(world: World) -> Iterator[Row]:
    from ftcli.merging.lora.merge import DENSE

    runs = world.runs(LORA)
    for label, weight in (("weight 1/3", 1 / 3), ("weight 0.5", 0.5)):
        document = {"merge_method": "lora_concat", "models": runs, "parameters": {"weight": weight}}
        yield world.row("lora", titled("lora_concat", label), document)
    svd = {"merge_method": "lora_svd", "models": runs, "parameters": _HALF}
    yield world.row("lora", "lora_svd, to one adapter's rank, weight 0.5", svd)
    for name in DENSE:
        variants = SETTINGS.get(name.removeprefix("lora_"))
        if variants is None:
            continue  # its method has no row, which is said of both
        label, given = variants[0]
        yield world.row("lora", titled(name, label), {"merge_method": name, "models": runs, "parameters": given})
    average = {"merge_method": "adapter_average", "models": world.runs(IA3)}
    yield world.row("ia3", "adapter_average, of IA3", average)


def _looked_for(world: World) -> Iterator[Row]:
    runs, judged = {"models": world.runs()}, {"evaluate": world.evaluation}
    base = {"base_model": world.base}
    yield world.row("looked for", "greedy_soup", {"merge_method": "greedy_soup", **runs, **judged})
    linear = {"merge_method": "search", **runs, **judged, "search": {"budget": 24}}
    yield world.row("looked for", "search, CMA-ES over linear", linear)
    arithmetic = {"merge_method": "search", **base, **runs, **judged, "search": {"method": "task_arithmetic", "budget": 32}}
    yield world.row("looked for", "search, CMA-ES over task_arithmetic", arithmetic)
    learned = {"merge_method": "learned_weights", **base, **runs, **judged, "steps": 40, "layer_groups": 4}
    yield world.row("looked for", "learned_weights, 4 groups of layers", learned)
    first = world.tasks[0]
    line = {"merge_method": "wise_ft", **base, "models": [str(world.run(first))], **judged}
    yield world.row("looked for", f"wise_ft, best of 11 alphas, {first} alone", line)
    name = "adapter_soup, the 2 nearest, for each task"
    soups = []
    for task in world.tasks:
        texts = str(world.folder / f"{task}-validation.jsonl")
        soups.append((world.place(name, f"-{task}"), {"merge_method": "adapter_soup", "models": world.runs(LORA), "texts": texts, "k": 2}))
    yield Row("lora", name, tuple(soups), tuple(place for place, _ in soups))
