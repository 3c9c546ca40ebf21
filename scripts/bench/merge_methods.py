"""Three fine-tunes of one base, merged by every method, measured on all three tasks: a table and a plot.

    python scripts/bench/merge_methods.py -o runs/merge-methods --shared ../shared --docs docs      everything, then docs
    python scripts/bench/merge_methods.py -o runs/merge-methods --steps 40 --rows 40 --bases tiny   in a few minutes

builtin:tiny learns `orders`, `reviews` and `clinic` (embedded); babyllama-361 learns `gsm8k`, `grimm` and `state-union` from the shared
folder. Each task is fine-tuned in full and with LoRA. Held-out rows are divided in two: merges that are looked for (greedy soup, search,
learned weights) see the validation half only, the table is of the other half. `gain` is how much of a task's own fine-tuning, in loss
against the base, a merge keeps: 100 % is the task's own model, 0 the base; the table is sorted by the mean over the tasks. Merges of whole
models are computed in memory by the functions that write them to disk; merges of adapters are written, and read back on the base. Runs and
results are kept: a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY, BABY = "tiny", "babyllama-361"
TASKS = {TINY: ("orders", "reviews", "clinic"), BABY: ("gsm8k", "grimm", "state-union")}
FILES = {"gsm8k": "gsm8k_train", "grimm": "corpus_grimm", "state-union": "corpus_state_union"}
LEARNING_RATES = {"full": 1e-3, "lora": 4e-3}
HELD_OUT = 5  # every fifth row of a file without a test split
SPARSE = {"density": 0.5}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "karcher": ("karcher", {}),
    "task_arithmetic, weight 0.5": ("task_arithmetic", {"weight": 0.5}),
    "task_arithmetic, weight 1": ("task_arithmetic", {"weight": 1.0}),
    "ties, density 0.5": ("ties", SPARSE),
    "ties, density 0.5, lambda 1.5": ("ties", {**SPARSE, "lambda": 1.5}),
    "dare_linear, weight 0.5": ("dare_linear", {**SPARSE, "weight": 0.5}),
    "dare_ties, weight 0.5": ("dare_ties", {**SPARSE, "weight": 0.5}),
    "della_linear, weight 0.5": ("della_linear", {**SPARSE, "weight": 0.5}),
    "della": ("della", SPARSE),
    "breadcrumbs, weight 0.5": ("breadcrumbs", {"density": 0.8, "weight": 0.5}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.8}),
    "sce": ("sce", {"select_topk": 0.5}),
    "model_stock": ("model_stock", {}),
    "ram": ("ram", {}),
    "ramplus_tl": ("ramplus_tl", {}),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora_concat, weight 1/3": {"merge_method": "lora_concat", "weight": 1 / 3},
    "lora_concat, weight 0.5": {"merge_method": "lora_concat", "weight": 0.5},
    "lora_svd to one adapter's rank, weight 0.5": {"merge_method": "lora_svd", "weight": 0.5},
    "lora_ties, density 0.5": {"merge_method": "lora_ties", "weight": 1.0, **SPARSE},
    "lora_dare_linear, weight 0.5": {"merge_method": "lora_dare_linear", "weight": 0.5, **SPARSE},
    "lora_della": {"merge_method": "lora_della", "weight": 1.0, **SPARSE},
}
LOOKED_FOR: dict[str, dict[str, Any]] = {
    "greedy soup": {"merge_method": "greedy_soup"},
    "search (CMA-ES, linear)": {"merge_method": "search", "search": {"budget": 24}},
    "search (CMA-ES, task_arithmetic)": {"merge_method": "search", "search": {"method": "task_arithmetic", "budget": 32}},
    "learned weights, 4 groups of layers": {"merge_method": "learned_weights", "steps": 40, "layer_groups": 4},
}

Losses = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """One base with its tasks."""

    name: str
    base: str
    folder: Path
    steps: int
    rows: int
    shared: Path | None

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS[self.name]

    @property
    def max_length(self) -> int:
        return 256 if self.name == BABY else 512

    def write_data(self) -> None:
        """train, validation and test of every task."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for task in self.tasks:
            train, held_out = self._parts(task)
            parts = {"train": train, "validation": held_out[::2][: self.rows], "test": held_out[1::2][: self.rows]}
            for part, rows in parts.items():
                (self.folder / f"{task}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def _parts(self, task: str) -> tuple[list[Any], list[Any]]:
        from ftcli.builtin.catalogue import dataset_path

        if task not in FILES:
            parts = read(dataset_path(task)), read(dataset_path(task, "test"))
            # reviews have their label as a column, too
            asked = [{key: row[key] for key in ("prompt", "completion")} if "prompt" in row else row for rows in parts for row in rows]
            return asked[: len(parts[0])], asked[len(parts[0]) :]
        if self.shared is None:
            raise SystemExit(f"{self.name} needs --shared: the folder with data/ and models/")
        rows = read(self.shared / "data" / f"{FILES[task]}.jsonl")
        if "text" in rows[0]:  # a few long texts become many passages
            rows = [{"text": row["text"][start : start + 240]} for row in rows for start in range(0, len(row["text"]) - 240, 240)]
        else:
            rows = [row for row in rows if sum(len(turn["content"]) for turn in row["messages"]) < self.max_length - 40]
        return [row for index, row in enumerate(rows) if index % HELD_OUT], rows[::HELD_OUT]

    def train(self, task: str, method: str) -> Path:
        """The run folder of one fine-tuning, made or found."""
        from ftcli.recipe.load import load_recipe
        from ftcli.reporting.live import Reporter
        from ftcli.training.run import run_recipe

        name = f"{task}-{method}"
        document = {
            "version": 1,
            "name": name,
            "model": {"base": self.base, **({"template": "plain"} if self.name == BABY else {})},
            "data": {"train": [{"source": {"kind": "file", "path": f"{task}-train.jsonl"}}], "max_length": self.max_length, "holdout": 0},
            "method": {"kind": method},
            "train": {"steps": self.steps, "global_batch_size": 16, "lr": LEARNING_RATES[method], "seed": 17},
            "output": str((self.folder / name).resolve()),
        }
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(json.dumps(document), encoding="utf-8")
        with Reporter() as reporter:
            run_recipe(load_recipe(recipe), reporter, resume=True)
        return self.folder / name

    def evaluation(self, part: str) -> dict[str, Any]:
        """An `evaluate` section over all tasks."""
        sources = [{"name": task, "source": {"kind": "file", "path": f"{task}-{part}.jsonl"}} for task in self.tasks]
        return {"sources": sources, "max_length": self.max_length}

    def measure(self) -> Iterator[tuple[str, str, Losses]]:
        """(group, name, loss of each task on the test half) of every merge."""
        from ftcli.merging.methods.registry import METHODS
        from ftcli.merging.search.judge import MergedModel, load_frame, open_measurer
        from ftcli.merging.search.recipe import Evaluate
        from ftcli.merging.search.space import settings_of
        from ftcli.merging.sources import open_source

        runs = {method: [self.train(task, method) for task in self.tasks] for method in LEARNING_RATES}
        here = self.folder.resolve()
        base = open_source(self.base, here)
        models = {method: [open_source(str(run.resolve()), here) for run in runs[method]] for method in runs}
        module, tokenizer = load_frame(base, "auto", models["full"][0])
        evaluate = Evaluate.model_validate_json(json.dumps(self.evaluation("test")), context={"folder": here})
        measurer = open_measurer(evaluate, tokenizer, module)

        def losses() -> Losses:
            return {task: scores["loss"] for task, scores in measurer.measure().items()}

        for method, sources in models.items():
            merged = MergedModel(module, sources, base)
            if method == "full":
                merged.fill_with(-1)
                yield "base", "the base", losses()
            for index, task in enumerate(self.tasks):
                merged.fill_with(index)
                yield f"own {method}", f"{task}, {method}", losses()
        merged = MergedModel(module, models["full"], base)
        for name, (method_name, given) in WHOLE.items():
            method = METHODS[method_name]
            settings = settings_of(method, given, len(self.tasks))
            merged.fill(method, lambda group, settings=settings: settings)
            yield "full", name, losses()
        for group, name, model in (*self._adapters(runs["lora"]), *self._looked_for(runs["full"])):
            MergedModel(module, [open_source(model, here)], None).fill_with(0)
            yield group, name, losses()

    def _adapters(self, runs: list[Path]) -> Iterator[tuple[str, str, str]]:
        from ftcli.merging.lora.recipe import read_adapter_recipe

        for name, given in ADAPTERS.items():
            output = self.folder / f"merged-{slug(name)}"
            if not output.is_dir():
                shared = {key: value for key, value in given.items() if key != "merge_method"}
                document = {"merge_method": given["merge_method"], "models": [str(run.resolve()) for run in runs], "parameters": shared}
                print(name, read_adapter_recipe(document, self.folder).run(output)["line"])
            yield "lora", name, f"{self.base}+{output.resolve()}"

    def _looked_for(self, runs: list[Path]) -> Iterator[tuple[str, str, str]]:
        from ftcli.merging.special import open_special

        for name, given in LOOKED_FOR.items():
            output = self.folder / f"merged-{slug(name)}"
            if not output.is_dir():
                needs_base = given["merge_method"] == "learned_weights" or given.get("search", {}).get("method")
                document = {**given, "models": [str(run.resolve()) for run in runs], "evaluate": self.evaluation("validation")}
                document |= {"base_model": self.base} if needs_base else {}
                path = self.folder / f"{slug(name)}.yaml"
                path.write_text(json.dumps(document), encoding="utf-8")
                special = open_special(path)
                assert special is not None
                report = special.run(output, threads=None, verify=False, say=lambda done, total, what: None, note=lambda line: None)
                print(name, report["lines"][0])
            yield "looked for", name, str(output.resolve())


def read(path: Path) -> list[Any]:
    """The rows of a JSON Lines file, packed or not."""
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def rows_of(results: list[tuple[str, str, Losses]], tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every merge with its losses and gains; the best mean gain first, the base and the tasks' own models on top."""
    base = next(losses for group, _, losses in results if group == "base")
    own = {group: dict(zip(tasks, [found for g, _, found in results if g == group], strict=True)) for group in ("own full", "own lora")}
    rows = []
    for group, name, losses in results:
        best = own["own lora" if group in ("lora", "own lora") else "own full"]
        if any(best[task][task] >= base[task] for task in tasks):
            raise SystemExit("a task's own fine-tuning is not better than the base: there is no gain to keep; give more --steps")
        gains = {task: (base[task] - losses[task]) / (base[task] - best[task][task]) for task in tasks}
        rows.append({"group": group, "name": name, "losses": losses, "gains": gains, "mean": sum(gains.values()) / len(tasks)})
    lead = [row for row in rows if row["group"] in ("base", "own full", "own lora")]
    return lead + sorted((row for row in rows if row not in lead), key=lambda row: -float(row["mean"]))


def table(rows: list[dict[str, Any]], tasks: tuple[str, ...]) -> list[str]:
    """Markdown."""
    lines = [
        f"| what | of | {' | '.join(f'{task}: loss' for task in tasks)} | {' | '.join(f'{task}: gain' for task in tasks)} | mean gain |",
        "|---|---|" + "--:|" * (2 * len(tasks) + 1),
    ]
    for row in rows:
        losses = " | ".join(f"{row['losses'][task]:.3f}" for task in tasks)
        gains = " | ".join(f"{100 * row['gains'][task]:.0f} %" for task in tasks)
        lines.append(f"| {row['name']} | {row['group']} | {losses} | {gains} | {100 * row['mean']:.0f} % |")
    return lines


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The mean gain of every merge, a dot for each task."""
    import matplotlib
    from matplotlib.figure import Figure

    from ftcli.reporting.plot import COLOURS, FAINT, INK

    with matplotlib.rc_context({"svg.hashsalt": "ftcli", "svg.fonttype": "none", "text.parse_math": False, "font.size": 8}):
        figure = Figure(figsize=(5.4 * len(found), 7.2), layout="constrained", facecolor="white")
        for axes, (name, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            shown = [row for row in rows if row["group"] in ("full", "lora", "looked for")][::-1]
            for height, row in enumerate(shown):
                colour = COLOURS[("full", "lora", "looked for").index(row["group"])]
                axes.plot(100 * row["mean"], height, "o", color=colour, markersize=7)
                axes.plot([100 * gain for gain in row["gains"].values()], [height] * len(row["gains"]), "|", color=colour, markersize=6)
            for index, group in enumerate(("full", "lora", "looked for")):
                axes.plot([], [], "o", color=COLOURS[index], label=group)
            axes.legend(frameon=False, loc="lower left")
            axes.set_yticks(range(len(shown)), [row["name"] for row in shown])
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.axvline(100, color=INK, linewidth=0.8, linestyle=":")
            axes.set_xlim(-60, 110)
            axes.set_xlabel("gain kept, % (dot: mean, strokes: tasks)", color=INK)
            axes.set_title(name, color=INK)
            axes.grid(color=FAINT, alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None, "Creator": "ftcli"})


def main() -> None:
    """Fine-tune, merge, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/merge-methods"))
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--bases", default=f"{TINY},{BABY}")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=100, help="of each half of the held-out rows of a task")
    parser.add_argument("--docs", type=Path, help="where merge-methods.md and merge-methods.svg go; the default is --output")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.bases.split(","):
        base = "builtin:tiny" if name == TINY else str((options.shared / "models" / name).resolve())
        bench = Bench(name, base, options.output / name, options.steps, options.rows, options.shared)
        bench.write_data()
        results = []
        for group, what, losses in bench.measure():
            print(f"{name}: {what}: " + ", ".join(f"{task} {loss:.3f}" for task, loss in losses.items()), flush=True)
            results.append((group, what, losses))
        found[name] = rows_of(results, bench.tasks)
        (options.output / f"{name}.json").write_text(json.dumps(found[name], indent=1), encoding="utf-8")
    docs = options.docs or options.output
    docs.mkdir(parents=True, exist_ok=True)
    text = ["# Merging three fine-tunes, method by method", "", (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip(), ""]
    text += [f"{options.steps} steps of 16 examples a task, {options.rows} test rows of each.", "", "![gain kept](merge-methods.svg)"]
    for name, rows in found.items():
        text += ["", f"## {name}", "", *table(rows, TASKS[name])]
    (docs / "merge-methods.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    plot(found, docs / "merge-methods.svg")


if __name__ == "__main__":
    main()
