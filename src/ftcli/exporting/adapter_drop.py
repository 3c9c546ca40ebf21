"""A run's bottleneck adapter without the adapters of its first layers: written as an adapter, or measured for every number of layers.

Speed is compared round by round, every number of layers in turn, so that a disturbance of the machine hits all alike.

Source: Rücklé et al. 2021, arXiv:2010.11918, figures 1 and 2.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem, RequestError
from ftcli.exporting.held_folder import new_held_folder
from ftcli.files import write_json
from ftcli.reporting.found_run import RESOLVED_RECIPE, read_run

if TYPE_CHECKING:
    from torch import nn

    from ftcli.data.store import TreeStore
    from ftcli.layout.batch import Batch
    from ftcli.layout.model import TreeModel
    from ftcli.recipe.recipe import Recipe

REPORT, PLOT = "adapter-drop.json", "adapter-drop.svg"
ROUNDS = 7
TIMED_EXAMPLES = 8


@dataclass(frozen=True, slots=True)
class DropRow:
    """What is left with the adapters of the first `layers` layers dropped."""

    layers: int
    losses: dict[str, float]
    """Nats per target of each evaluation source."""
    relative_time: float
    """Time of a forward pass over that with every adapter, median of the rounds."""


@dataclass(frozen=True, slots=True)
class DropReport:
    """Quality and speed for every number of layers, from none to all."""

    run: str
    rows: list[DropRow]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """A table for people."""
        sources = list(self.rows[0].losses)
        found = ["  ".join(["layers dropped", *(f"{name:>12}" for name in sources), "relative time"])]
        for row in self.rows:
            cells = [f"{row.layers:>14}", *(f"{row.losses[name]:12.4f}" for name in sources), f"{row.relative_time:13.3f}"]
            found.append("  ".join(cells))
        return found


def write_dropped(run: Path, count: int, output: Path) -> int:
    """Write the run's adapter without those of the first `count` layers, and its tokenizer; gives how many layers keep one.

    Raises:
        RequestError: the run has no bottleneck adapter, nothing would be left of it, or the folder is there already.
    """
    from ftcli.methods.bottleneck.drop import layer_of, without_first
    from ftcli.methods.bottleneck.files import read_adapter, write_adapter
    from ftcli.models.fingerprint import BASE_FILE
    from ftcli.models.tokenizer import load_tokenizer

    folder = _adapter_folder(run)
    if output.exists():
        raise RequestError("the adapter was not written", [Problem("--output", f"`{output}` is there already", "another name")])
    config, tensors = without_first(*read_adapter(folder), count)
    # The run's recipe knows the base by a name that can be opened again.
    config["base_model_name_or_path"] = _recipe(run).model.base or config.get("base_model_name_or_path")
    with new_held_folder(output) as partial:
        write_adapter(partial, config, tensors)
        load_tokenizer(str(folder.resolve())).save(partial)
        if (folder / BASE_FILE).is_file():
            shutil.copy(folder / BASE_FILE, partial / BASE_FILE)
    return len({layer_of(name) for name in config["target_modules"]})


def measure_drops(run: Path, progress: Any = None) -> DropReport:
    """Loss of every evaluation source and time of a forward pass for every number of dropped layers; written into the run folder.

    Raises:
        RequestError: the run has no bottleneck adapter, or no evaluation sources.
    """
    from ftcli.exporting.open_target import open_target
    from ftcli.layout.model import TreeModel
    from ftcli.methods.bottleneck.drop import num_layers_of
    from ftcli.training.assemble import assemble_data, make_accelerator

    _adapter_folder(run)
    recipe = _recipe(run)
    stores = assemble_data(recipe, progress).prepared.evaluation
    if not stores:
        raise RequestError("there is nothing to measure", [Problem(str(run), "the run has no evaluation sources", "data.evaluation")])
    accelerator = make_accelerator(recipe, None)
    loaded = open_target(str(run), device=str(accelerator.device))
    model = TreeModel(loaded.model, _layout(run)).eval()
    counts = range(num_layers_of(loaded.model) + 1)
    losses = [_losses(accelerator, model, recipe, stores, loaded.tokenizer.pad_id or 0, count) for count in counts]
    times = _relative_times(model, _timed_batch(model, recipe, stores[0]).to(accelerator.device), list(counts))
    report = DropReport(run.name, [DropRow(count, losses[count], round(times[count], 4)) for count in counts])
    write_json(run / REPORT, report.to_json())
    _plot(report, run / PLOT)
    return report


def _losses(accelerator: Any, model: TreeModel, recipe: Recipe, stores: list[TreeStore], pad_id: int, count: int) -> dict[str, float]:
    from ftcli.evaluation.loss import measure_loss
    from ftcli.methods.bottleneck.drop import skip_first

    skip_first(model.module, count)
    budget = recipe.train.micro_batch_tokens
    return {
        store.name: measure_loss(
            accelerator, model, recipe.objective, store, layout=model.layout, micro_batch_tokens=budget, pad_id=pad_id
        ).loss
        for store in stores
    }


def _timed_batch(model: TreeModel, recipe: Recipe, store: TreeStore) -> Batch:
    from ftcli.layout.build import build_posed

    posed = [recipe.objective.pose(store.tree(index), is_measured=True) for index in range(min(TIMED_EXAMPLES, len(store)))]
    return build_posed(model.layout, posed)


def _relative_times(model: nn.Module, batch: Batch, counts: list[int]) -> list[float]:
    """Median over rounds of each count's time over that of the first count in the same round."""
    import torch

    from ftcli.methods.bottleneck.drop import skip_first

    module: nn.Module = model.module  # type: ignore[assignment]

    def seconds(count: int) -> float:
        skip_first(module, count)
        return _seconds(lambda: model(batch), batch.input_ids.device)

    ratios: list[list[float]] = [[] for _ in counts]
    with torch.inference_mode():
        for round_index in range(ROUNDS + 1):
            # Forth and back, so that a drift of the machine's rate evens out.
            order = counts if round_index % 2 else counts[::-1]
            taken = {count: seconds(count) for count in order}
            for index, count in enumerate(counts if round_index else []):  # the first round warms up
                ratios[index].append(taken[count] / taken[counts[0]])
    return [statistics.median(found) for found in ratios]


def _seconds(act: Callable[[], Any], device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _plot(report: DropReport, path: Path) -> None:
    """Losses above, relative time below, over the layers dropped."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    layers = [row.layers for row in report.rows]
    with rc_context({"svg.hashsalt": "ftcli", "text.parse_math": False}):
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for name in report.rows[0].losses:
            above.plot(layers, [row.losses[name] for row in report.rows], marker="o", label=name)
        above.set_ylabel("loss, nats per target")
        above.legend(frameon=False)
        below.plot(layers, [row.relative_time for row in report.rows], marker="o", color="black")
        below.set_ylabel("relative time of a forward pass")
        below.set_xlabel("first layers without adapters")
        figure.savefig(path, metadata={"Date": None, "Creator": "ftcli"})


def _layout(run: Path) -> str:
    """The layout that the run's probe chose."""
    return str(json.loads((run / "manifest.json").read_text(encoding="utf-8")).get("layout", {}).get("layout", "rows"))


def _recipe(run: Path) -> Recipe:
    from ftcli.recipe.load import load_recipe

    return load_recipe(run / RESOLVED_RECIPE).recipe


def _adapter_folder(run: Path) -> Path:
    """Where the run's bottleneck adapter is.

    Raises:
        RequestError: the run has none.
    """
    from ftcli.methods.bottleneck_settings import BottleneckSettings

    found = read_run(run)
    if not isinstance(_recipe(run).method, BottleneckSettings):
        what = f"its method is `{found.method}`"
        raise RequestError("the run has no bottleneck adapter", [Problem(str(run), what, "kind: adapter, or kind: adamix")])
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise RequestError("the run has no bottleneck adapter", [Problem(str(run), f"the run is {found.state}", "go on with --resume")])
    return run / "adapter"
