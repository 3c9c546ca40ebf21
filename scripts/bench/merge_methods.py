"""Three fine-tunes of one base, merged by every registered method, measured on all three tasks: a table and a plot.

    python scripts/bench/merge_methods.py -o runs/merge-methods --shared ../shared --docs docs      everything, then docs
    python scripts/bench/merge_methods.py -o runs/merge-methods --steps 40 --rows 40 --bases tiny   in a few minutes

builtin:tiny learns `orders`, `reviews` and `clinic` (embedded); babyllama-361 learns `svamp`, `grimm` and `state-union` from the shared
folder. Each task is fine-tuned in full, with LoRA and with IA3. Held-out rows are divided in two: merges that are looked for (greedy soup,
searches, learned weights) see the validation half only, the table is of the other half. `gain` is how much of a task's own fine-tuning of
that kind, in loss against the base, a merge keeps: 100 % is the task's own model, 0 the base; the table is sorted by the mean over the
tasks. Every merge is a recipe, carried out as `ftcli merge` does and measured as it was written; adapters are read back on the base.
Methods of two models are folded in the order of the tasks, methods of one take the first task's model, and the rows say so. `fisher` and
`regmean` have statistics of 64 training rows of each task. Results are kept: a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_report import Losses, judged, write_docs
from merge_rows import EXAMPLES, FULL, IA3, LORA, Row, World, all_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftcli.merging.search.judge import Measurer

TINY, BABY = "tiny", "babyllama-361"
TASKS = {TINY: ("orders", "reviews", "clinic"), BABY: ("svamp", "grimm", "state-union")}
FILES = {"svamp": "svamp", "grimm": "corpus_grimm", "state-union": "corpus_state_union"}
LEARNING_RATES = {FULL: 1e-3, LORA: 4e-3, IA3: 5e-2}
HELD_OUT = 3  # every third row of a file without a test split
PASSAGE = 240


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

    @cached_property
    def world(self) -> World:
        from ftcli.merging.layers import num_layers
        from ftcli.merging.sources import open_source

        depth = num_layers(open_source(self.base, self.folder).config) or 1
        return World(self.base, self.folder, self.tasks, depth, self.evaluation("validation"))

    def write_data(self) -> None:
        """train, validation and test of every task.

        Raises:
            SystemExit: the folder has results of other sizes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes, noted = {"steps": self.steps, "rows": self.rows}, self.folder / "sizes.json"
        if noted.is_file() and json.loads(noted.read_text()) != sizes:
            raise SystemExit(f"{self.folder} has results with {noted.read_text()}: give the same sizes, or another --output")
        noted.write_text(json.dumps(sizes), encoding="utf-8")
        for task in self.tasks:
            train, held_out = self._parts(task)
            parts = {"train": train, "validation": held_out[::2][: self.rows], "test": held_out[1::2][: self.rows]}
            if len(parts["test"]) < self.rows:
                raise SystemExit(f"{task} has {len(parts['test'])} test rows, not --rows {self.rows}")
            for part, rows in parts.items():
                path = self.folder / f"{task}-{part}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

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
            rows = [{"text": row["text"][at : at + PASSAGE]} for row in rows for at in range(0, len(row["text"]) - PASSAGE, PASSAGE)]
        else:
            rows = [row for row in rows if sum(map(len, row.values())) < self.max_length - 40]
        return [row for index, row in enumerate(rows) if index % HELD_OUT], rows[::HELD_OUT]

    def train(self, task: str, method: str) -> None:
        """One fine-tuning, made or found."""
        from ftcli.recipe.load import load_recipe
        from ftcli.reporting.live import Reporter
        from ftcli.training.run import run_recipe

        run = self.world.run(task, method)
        document = {
            "version": 1,
            "name": run.name,
            "model": {"base": self.base, **({"template": "plain"} if self.name == BABY else {})},
            "data": {"train": [{"source": {"kind": "file", "path": f"{task}-train.jsonl"}}], "max_length": self.max_length, "holdout": 0},
            "method": {"kind": method},
            "train": {"steps": self.steps, "global_batch_size": 16, "lr": LEARNING_RATES[method], "seed": 17},
            "output": str(run),
        }
        recipe = self.folder / f"{run.name}.yaml"
        recipe.write_text(json.dumps(document), encoding="utf-8")
        with Reporter() as reporter:
            run_recipe(load_recipe(recipe), reporter, resume=True)

    def gather(self) -> None:
        """The statistics of every task's model on its own training rows, made or found."""
        from ftcli.merging.statistics import KINDS, gather_statistics

        for task in self.tasks:
            for kind in KINDS:
                output, data = self.world.statistics(task, kind), self.folder / f"{task}-train.jsonl"
                if not output.is_file():
                    model = str(self.world.run(task))
                    gather_statistics(model, output, kind, data=data, num_examples=EXAMPLES, max_length=self.max_length)

    def evaluation(self, part: str) -> dict[str, Any]:
        """An `evaluate` section over all tasks."""
        sources = [{"name": task, "source": {"kind": "file", "path": str(self.folder / f"{task}-{part}.jsonl")}} for task in self.tasks]
        return {"sources": sources, "max_length": self.max_length}

    def measured(self, rows: list[Row]) -> tuple[list[tuple[str, str, Losses]], dict[str, Losses]]:
        """(group, name, losses on the test half) of the base, the tasks' own models and every row; validation losses of what is soup."""
        meter = Meter(self)
        results = [("base", "the base", meter.losses("base", [self.base]))]
        for method in LEARNING_RATES:
            for task in self.tasks:
                name = f"{task}, {method}"
                results.append((f"own {method}", name, meter.losses(name, [self._plain(self.world.run(task, method), method)])))
        for row in rows:
            for place, document in row.documents:
                merge(document, place)
            models = [self._plain(place, row.group) if row.group in (LORA, IA3) else str(place) for place in row.measured]
            results.append((row.group, row.name, meter.losses(row.name, models)))
        soup = next(row for row in rows if row.name == "greedy_soup")
        validation = {task: meter.losses(f"{task}, on validation", [str(self.world.run(task))], "validation") for task in self.tasks}
        return results, {**validation, "greedy_soup": meter.losses("soup, on validation", [str(soup.measured[0])], "validation")}

    def _plain(self, place: Path, kind: str) -> str:
        """The model that an adapter makes of the base, as merge recipes name it."""
        from ftcli.exporting.merge_run import merge_folder

        if kind != IA3:
            return f"{self.base}+{place}" if kind == LORA else str(place)
        folded = place.with_name(f"{place.name}-folded")
        if not folded.is_dir():
            merge_folder(self.base, place / "adapter" if (place / "adapter").is_dir() else place, folded, dtype="float32")
        return str(folded)


class Meter:
    """Measures models on the tasks, and keeps what it measured."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._path = bench.folder / "measured.json"
        self._kept: dict[str, Losses] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        self._opened: dict[str, tuple[PreTrainedModel, Measurer]] = {}

    def losses(self, name: str, models: list[str], part: str = "test") -> Losses:
        """Loss of each task under one model, or under one for each task."""
        if name not in self._kept:
            found = [self._of_model(model, part) for model in models]
            one_each = found * len(self._bench.tasks) if len(found) == 1 else found
            self._kept[name] = {task: losses[task] for task, losses in zip(self._bench.tasks, one_each, strict=True)}
            self._path.write_text(json.dumps(self._kept, indent=1), encoding="utf-8")
        print(f"{self._bench.name}: {name}: " + ", ".join(f"{task} {loss:.3f}" for task, loss in self._kept[name].items()), flush=True)
        return self._kept[name]

    def _of_model(self, model: str, part: str) -> Losses:
        from ftcli.merging.search.judge import MergedModel
        from ftcli.merging.sources import open_source

        module, measurer = self._open(part)
        MergedModel(module, [open_source(model, self._bench.folder)], None).fill_with(0)
        return {task: scores["loss"] for task, scores in measurer.measure().items()}

    def _open(self, part: str) -> tuple[PreTrainedModel, Measurer]:
        from ftcli.merging.search.judge import load_frame, open_measurer
        from ftcli.merging.search.recipe import Evaluate
        from ftcli.merging.sources import open_source

        if part not in self._opened:
            bench = self._bench
            base = open_source(bench.base, bench.folder)
            speaker = open_source(str(bench.world.run(bench.tasks[0])), bench.folder)
            module, tokenizer = load_frame(base, "auto", speaker)
            evaluate = Evaluate.model_validate_json(json.dumps(bench.evaluation(part)), context={"folder": bench.folder})
            self._opened[part] = module, open_measurer(evaluate, tokenizer, module)
        return self._opened[part]


def merge(document: dict[str, Any], output: Path) -> None:
    """The merge of a recipe, made or found."""
    from ftcli.merging.outcome import carry_out_plan
    from ftcli.merging.plan import plan_merge
    from ftcli.merging.recipe import load_merge_recipe
    from ftcli.merging.special import open_special

    if output.is_dir():
        return
    path = output.with_name(f"{output.name}.yaml")
    path.write_text(json.dumps(document), encoding="utf-8")
    if (special := open_special(path)) is not None:
        report = special.run(output, threads=1, verify=True, say=lambda done, total, what: None, note=lambda line: None)
        print(report["lines"][0], flush=True)
        return
    carry_out_plan(plan_merge(load_merge_recipe(path), output, threads=1), output, threads=1, resume=False, verify=True)


def read(path: Path) -> list[Any]:
    """The rows of a JSON Lines file, packed or not."""
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def benches(options: argparse.Namespace) -> Iterator[Bench]:
    names, sizes = options.bases.split(","), options.rows.split(",")
    for name, rows in zip(names, sizes * len(names) if len(sizes) == 1 else sizes, strict=True):
        base = "builtin:tiny" if name == TINY else str((options.shared / "models" / name).resolve())
        yield Bench(name, base, (options.output / name).resolve(), options.steps, int(rows), options.shared)


def main() -> None:
    """Fine-tune, merge, measure, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/merge-methods"))
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--bases", default=f"{TINY},{BABY}")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", default="120", help="of each half of the held-out rows of a task; with a comma: for each base")
    parser.add_argument("--docs", type=Path, help="where merge-methods.md and merge-methods.svg go; the default is --output")
    options = parser.parse_args()
    worlds = {}
    for bench in list(benches(options)):
        all_rows(bench.world)  # before anything is trained: a method without a row ends it here
        bench.write_data()
        for method in LEARNING_RATES:
            for task in bench.tasks:
                bench.train(task, method)
        bench.gather()
        sizes = f"{bench.steps} steps of 16 examples a task; {bench.rows} validation and {bench.rows} test rows of each."
        worlds[bench.name] = judged(*bench.measured(all_rows(bench.world)), bench.tasks, sizes)
        (options.output / f"{bench.name}.json").write_text(json.dumps(worlds[bench.name].to_json(), indent=1), encoding="utf-8")
    about = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip()
    write_docs(options.docs or options.output, worlds, about)


if __name__ == "__main__":
    main()
