"""Every method with its defaults on small real tasks: one table, and a plot of quality against trained parameters.

    python scripts/bench/methods.py --shared ../shared -o runs/methods            all methods, tasks and seeds, then the table
    python scripts/bench/methods.py --shared ../shared -o runs/methods --only lora,full --seeds 17
    python scripts/bench/methods.py -o runs/methods --table                       only the table and the plot, of what is there

Tasks: `banking20` is twenty labels of banking77, learnt as text; quality is the accuracy among the twenty by log-likelihood. `orders`
is the embedded order task; quality is the share of orders whose JSON is generated exactly. Bases: builtin:tiny for both, babyllama-361
(one token a character, context 256: too short for an order) for banking20. A recipe says `method: {kind: X}` and nothing
else of the method; steps, batch size and schedule are the same for all, the learning rate is the method's default. Every run is a
process forked from one that has the libraries imported, so that its peak memory is its own. Results are kept by run: a second call goes
on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "freeze (top 2 layers)": {"kind": "freeze", "top_layers": 2},
    "bitfit (added biases)": {"kind": "bitfit", "add_biases": True},
    "norms": {"kind": "norms"},
    "hft": {"kind": "hft"},
    "lisa": {"kind": "lisa"},
    "lora": {"kind": "lora"},
    "dora": {"kind": "lora", "variant": "dora"},
    "qlora": {"kind": "qlora"},
    "adalora": {"kind": "adalora"},
    "ia3": {"kind": "ia3"},
    "loha": {"kind": "peft", "type": "loha"},
    "lokr": {"kind": "peft", "type": "lokr"},
    "vera": {"kind": "peft", "type": "vera"},
    "oft": {"kind": "peft", "type": "oft"},
    "boft": {"kind": "peft", "type": "boft"},
    "hra": {"kind": "peft", "type": "hra"},
    "adapter (pfeiffer)": {"kind": "adapter", "preset": "pfeiffer"},
    "adapter (houlsby)": {"kind": "adapter", "preset": "houlsby"},
    "adapter (parallel)": {"kind": "adapter", "preset": "parallel"},
    "adamix": {"kind": "adamix"},
    "prefix": {"kind": "prefix"},
    "prompt": {"kind": "prompt"},
    "p_tuning": {"kind": "p_tuning"},
}
STEPS = {"banking20": 240, "banking20, characters": 120, "orders": 100}
NUM_LABELS, NUM_TEST = 20, 100
MAX_CHARACTERS = 160
"""Of a question: with its label it fits a context of 256 characters."""
PEAK_UNITS = 1024  # Linux counts ru_maxrss in KiB


@dataclass(frozen=True)
class Case:
    """One run of the table."""

    base: str
    task: str
    method: str
    seed: int

    @property
    def is_narrow(self) -> bool:
        """The base sees one token a character, and 256 of them."""
        return "babyllama" in self.base

    @property
    def steps(self) -> int:
        return STEPS["banking20, characters" if self.is_narrow else self.task]

    @property
    def name(self) -> str:
        words = f"{Path(self.base).name.replace(':', '-')}-{self.task}-{self.method}-{self.seed}"
        return "".join(c if c.isalnum() or c == "-" else "-" for c in words)


def write_banking(shared: Path, folder: Path) -> None:
    """Twenty labels of banking77 as prompt and completion, 200 rows held out, the same whatever the seed of a run."""
    rows = [json.loads(line) for line in (shared / "data" / "banking77_train.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})[:NUM_LABELS]
    pairs = [
        {"prompt": f"{row['text'].strip()}\nTopic:", "completion": f" {row['label']}"}
        for row in rows
        if row["label"] in labels and len(row["text"]) <= MAX_CHARACTERS
    ]
    random.Random(0).shuffle(pairs)
    for name, part in (("banking20-test", pairs[:NUM_TEST]), ("banking20-train", pairs[NUM_TEST:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part), encoding="utf-8")


def recipe(case: Case, folder: Path) -> dict[str, Any]:
    """The same recipe for all methods, but for the method."""
    train: dict[str, Any]
    test: dict[str, Any]
    if case.task == "banking20":
        train, test = (
            {"source": {"kind": "file", "path": str(folder / f"banking20-{split}.jsonl")}, "format": {"kind": "completion"}}
            for split in ("train", "test")
        )
    else:
        train = {"source": {"kind": "builtin", "name": "orders"}, "format": {"kind": "chat"}}
        test = {"source": {"kind": "builtin", "name": "orders", "split": "test"}, "format": {"kind": "chat"}}
        test["generate"] = {"metrics": [{"kind": "exact-match"}], "max_new_tokens": 112, "limit": NUM_TEST}
    stories = {"source": {"kind": "builtin", "name": "stories", "split": "test"}, "format": {"kind": "text"}, "limit": 50}
    return {
        "version": 1,
        "name": case.name,
        "model": {"base": case.base},
        "data": {
            "train": [train],
            "evaluation": [
                {**test, "name": "task", "limit": NUM_TEST},
                {**stories, "name": "stories", "role": "retained"},
            ],
            "max_length": 232 if case.is_narrow else 480,
        },
        "method": METHODS[case.method],
        "train": {
            "steps": case.steps,
            "global_batch_size": 16,
            "seed": case.seed,
            "schedule": {"kind": "cosine", "warmup_ratio": 0.05},
        },
        "every": {"log": 20, "save": 1000},
        "output": str(folder / "runs" / case.name),
    }


def run_case(case: Case, folder: Path) -> None:
    """Train, and keep the figures; runs in a process of its own."""
    from ftcli.recipe.load import load_recipe
    from ftcli.reporting.live import Reporter
    from ftcli.training.run import run_recipe

    path = folder / f"{case.name}.yaml"
    shutil.rmtree(folder / "runs" / case.name, ignore_errors=True)  # of a run that was stopped
    path.write_text(json.dumps(recipe(case, folder)))
    with Reporter(silent=True) as reporter:
        summary = run_recipe(load_recipe(path), reporter)
    run = folder / "runs" / case.name
    manifest = json.loads((run / "manifest.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "train"][-1]
    weights = sum(file.stat().st_size for file in (run / manifest["artefact"]).rglob("*.safetensors"))
    result = {
        "trained": manifest["parameters"]["trainable"],
        "total": manifest["parameters"]["total"],
        "artefact_bytes": weights,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNITS,
        "tokens_per_second": last["tokens"] / last["seconds"],
        "lr": manifest["lr"],
        "layout": manifest["layout"]["layout"],
        "before": summary["before"],
        "after": summary["after"],
        "quality": [_exact(summary[side]) for side in ("before", "after")]
        if case.task == "orders"
        else [accuracy(target, folder) for target in (case.base, str(run))],
        "overhead": inference_overhead(run, case.base),
        "failed_proofs": [proof["name"] for proof in summary["proofs"] if not proof["passed"]],
    }
    (folder / f"{case.name}.json").write_text(json.dumps(result))
    shutil.rmtree(run)
    path.unlink()


def _exact(sources: dict[str, Any]) -> float:
    return float(sources["task"]["exact-match"])


def accuracy(target: str, folder: Path) -> float:
    """Share of the held-out questions whose own label is the likeliest of the twenty."""
    from ftcli.evaluation.evaluate import open_subject
    from ftcli.evaluation.tasks.multiple_choice import MultipleChoice

    source = {"kind": "file", "path": str(folder / "banking20-test.jsonl")}
    lines = (folder / "banking20-train.jsonl").read_text(encoding="utf-8").splitlines()
    labels = sorted({json.loads(line)["completion"].strip() for line in lines})
    columns = {"prompt": "{prompt}", "choices": labels, "answer": "completion", "limit": NUM_TEST}
    task = MultipleChoice.model_validate_json(json.dumps({"name": "banking20", "kind": "multiple-choice", "source": source, **columns}))
    return task.measure(open_subject(target, "cpu")[1]).figures["accuracy"].interval.value


def inference_overhead(run: Path, base: str) -> float:
    """Seconds of a forward pass with the method attached over the base's own, the median of interleaved pairs."""
    import numpy as np
    import torch

    from ftcli.data.tree import SPAN, path_tree
    from ftcli.exporting.open_target import open_target
    from ftcli.layout.model import TreeModel
    from ftcli.training.proofs import probe_log_probs

    tokens = np.arange(3, 203, dtype=np.int32) % 90
    trees = [path_tree(tokens, np.zeros(0, dtype=SPAN), 200, 0)] * 4
    models = [TreeModel(open_target(target).model) for target in (base, str(run))]
    ratios = []
    with torch.inference_mode():
        for _ in range(12):
            seconds = []
            for model in models:
                began = time.perf_counter()
                probe_log_probs(model, trees)
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[2:])


def run_all(cases: list[Case], folder: Path) -> None:
    """Every case that has no result yet, one after the other."""
    import peft  # noqa: F401 - imported once, for all the forks
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    for index, case in enumerate(cases, 1):
        if (folder / f"{case.name}.json").exists():
            continue
        began = time.monotonic()
        process = context.Process(target=run_case, args=(case, folder))
        process.start()
        process.join()
        print(f"{index}/{len(cases)} {case.name}: exit {process.exitcode}, {time.monotonic() - began:.0f} s", flush=True)


def results_of(cases: list[Case], folder: Path) -> Iterator[tuple[Case, dict[str, Any]]]:
    for case in cases:
        path = folder / f"{case.name}.json"
        if path.exists():
            yield case, json.loads(path.read_text())


def table(cases: list[Case], folder: Path) -> str:
    """Markdown, a table for every base and task; quality is the mean over seeds with its range."""
    found = list(results_of(cases, folder))
    parts = []
    for base, task in dict.fromkeys((case.base, case.task) for case in cases):
        rows = []
        for method in METHODS:
            results = [result for case, result in found if (case.base, case.task, case.method) == (base, task, method)]
            if results:
                rows.append((statistics.mean(_quality(r) for r in results), _row(method, results)))
        header = (
            "| method | lr | trained | saved | peak MB | tokens/s | quality % (mean, range over seeds) | loss | stories bits/byte | "
            "forward pass / base's |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
        )
        before = next((r for c, r in found if (c.base, c.task) == (base, task)), None)
        first = "" if before is None else _base_row(before)
        parts.append("\n".join([f"### {task}, {Path(base).name}\n", header, first, *(row for _, row in sorted(rows, reverse=True))]))
    return "\n\n".join(parts) + "\n"


def _quality(result: dict[str, Any]) -> float:
    return 100 * float(result["quality"][1])


def _base_row(result: dict[str, Any]) -> str:
    before = result["before"]
    return (
        f"| (untuned base) | | | | | | {100 * result['quality'][0]:.1f} | {before['task']['loss']:.3f} | "
        f"{before['stories']['bits_per_byte']:.3f} | 1.00 |"
    )


def _row(method: str, results: list[dict[str, Any]]) -> str:
    def mean(read: Any) -> float:
        return statistics.mean(read(result) for result in results)

    qualities = [_quality(result) for result in results]
    spread = f"{statistics.mean(qualities):.1f} ({min(qualities):.1f}-{max(qualities):.1f}, n={len(qualities)})"
    first = results[0]
    cells = [
        f"{first['lr']:.2g}",
        f"{first['trained']:,}",
        f"{first['artefact_bytes'] / 1e6:.2f} MB",
        f"{mean(lambda r: r['peak_bytes']) / 1e6:.0f}",
        f"{mean(lambda r: r['tokens_per_second']):.0f}",
        spread,
        f"{mean(lambda r: r['after']['task']['loss']):.3f}",
        f"{mean(lambda r: r['after']['stories']['bits_per_byte']):.3f}",
        f"{mean(lambda r: r['overhead']):.2f}",
    ]
    return f"| {method} | {' | '.join(cells)} |"


def plot(cases: list[Case], folder: Path, path: Path) -> None:
    """Quality against trained parameters, a panel for every base and task."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ftcli"
    from matplotlib import pyplot

    found = list(results_of(cases, folder))
    panels = list(dict.fromkeys((case.base, case.task) for case in cases))
    labelled: list[tuple[Any, list[tuple[float, float, str]]]] = []
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.2 * len(panels), 5.2), squeeze=False)
    for axis, (base, task) in zip(axes[0], panels, strict=True):
        points: list[tuple[float, float, str]] = []
        for method in METHODS:
            results = [result for case, result in found if (case.base, case.task, case.method) == (base, task, method)]
            if results:
                x, y = results[0]["trained"], [_quality(result) for result in results]
                centre = statistics.mean(y)
                axis.errorbar(x, centre, yerr=[[centre - min(y)], [max(y) - centre]], fmt="o", markersize=4, color="#3366aa", linewidth=1)
                points.append((x, centre, method))
        axis.set(
            xscale="log",
            xlabel="trained parameters",
            ylabel="exact match, %" if task == "orders" else "accuracy, %",
            title=f"{task}, {Path(base).name}",
        )
        axis.grid(alpha=0.25)
        labelled.append((axis, points))
    figure.tight_layout()
    for axis, points in labelled:
        label(axis, points)
    figure.savefig(path, metadata={"Date": None})


def label(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Write the name of every point beside it, upwards where another name stands there already."""
    size, taken = 6.5, list[tuple[float, float, float]]()
    per_pixel = 72 / axis.figure.dpi
    right = axis.transAxes.transform((1, 1))[0] * per_pixel
    for x, y, name in sorted(points, key=lambda point: (point[1], point[0])):
        left, bottom = axis.transData.transform((x, y)) * per_pixel
        width, height = 0.56 * size * len(name), 1.1 * size
        left += 4 if left + 4 + width < right else -4 - width
        start = bottom
        while any(left < end and first < left + width and abs(bottom - other) < height for first, end, other in taken):
            bottom += 1
        taken.append((left, left + width, bottom))
        offset = (left - axis.transData.transform((x, y))[0] * per_pixel, bottom - start - size / 3)
        line = {"arrowstyle": "-", "linewidth": 0.3, "color": "#999999"} if bottom - start > height else None
        axis.annotate(name, (x, y), fontsize=size, xytext=offset, textcoords="offset points", arrowprops=line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="methods, by their names or parts of them, with commas between")
    parser.add_argument("--tasks", default="builtin:orders,builtin:banking20,babyllama:banking20")
    parser.add_argument("--seeds", default="17,18,19")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bases = {"builtin": "builtin:tiny", "babyllama": str((options.shared / "models" / "babyllama-361").resolve())}
    wanted = options.only.split(",") if options.only else [""]
    cases = [
        Case(bases[base], task, method, int(seed))
        for seed in options.seeds.split(",")
        for base, task in (pair.split(":") for pair in options.tasks.split(","))
        for method in METHODS
        if any(part in method for part in wanted)
    ]
    if not options.table:
        write_banking(options.shared, folder)
        run_all(cases, folder)
    text = table(cases, folder)
    (folder / "table.md").write_text(text, encoding="utf-8")
    plot(cases, folder, folder / "methods.svg")
    print(text)


if __name__ == "__main__":
    main()
