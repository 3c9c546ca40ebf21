"""What is learnt of new text and what is kept of the old, by every way of holding on: a table and the Pareto plot.

    python scripts/bench/forgetting.py --shared ../shared -o runs/forgetting                  every row, rate and seed, then the table
    python scripts/bench/forgetting.py --shared ../shared -o runs/forgetting --only replay --worlds tiny-clinic
    python scripts/bench/forgetting.py -o runs/forgetting --table                             only the table and the plot, of what is there

A world is a base, a new domain, and text of the base's own kind that is to be kept: the stories that builtin:tiny was trained on, and for
bases whose training text is not at hand, what they write themselves. Every row sees the same number of tokens, replayed
ones among them. Its learning rate is chosen from one and three times the method's default by the mean of both losses with the
first seed, and beyond these for as long as the best is the last one tried; two more seeds are run with the chosen one. Figures are bits
per byte of held-out text, the mean over seeds with their range; the cost is the processor time of the whole run, evaluation included.
Every run is a process forked from one that has the libraries imported; results are kept, and a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods import label

SEEDS = (17, 18, 19)
RATES = (0.03, 0.1, 0.33, 1.0, 3.0, 10.0, 30.0)
FIRST = (1.0, 3.0)
BLOCK, BATCH = 256, 8
BLOCKS_ADDED = 2


def replay(share: float | dict[str, Any]) -> dict[str, Any]:
    return {"mixture": {"kind": "replay", "share_of_new": share}}


def held(*regularizers: dict[str, Any]) -> dict[str, Any]:
    return {"objective": {"kind": "causal-lm", "regularize": list(regularizers)}}


LORA = {r: {"method": {"kind": "lora", "rank": r}} for r in (4, 16, 64)}
KL, L2_SP = {"kind": "kl"}, {"kind": "l2_sp"}
EWC = {"kind": "ewc", "weight": 100.0, "examples": 128, "labels": "data"}
ROWS: dict[str, dict[str, Any]] = {
    "full": {},
    **{f"replay {percent} %": replay(1 - percent / 100) for percent in (1, 5, 10, 25, 50)},
    "replay, new 25 to 80 %": replay({"from": 0.25, "to": 0.80}),
    "kl": held(KL),
    "l2_sp": held(L2_SP),
    "ewc": held(EWC),
    "hft": {"method": {"kind": "hft"}},
    **{f"lora r{rank}": parts for rank, parts in LORA.items()},
    "blocks": {"grow": {"kind": "blocks", "num_blocks": BLOCKS_ADDED}, "method": {"kind": "freeze", "grown": True}},
    "hft + replay 25 %": {"method": {"kind": "hft"}, **replay(0.75)},
    "lora r64 + replay 25 %": {**LORA[64], **replay(0.75)},
    **{f"kl on replay {percent} %": {**held({**KL, "on": "replay"}), **replay(1 - percent / 100)} for percent in (10, 25)},
    "l2_sp + replay 25 %": {**held(L2_SP), **replay(0.75)},
    **{f"ewc + replay {percent} %": {**held(EWC), **replay(1 - percent / 100)} for percent in (10, 25)},
    "blocks + replay 25 %": {
        "grow": {"kind": "blocks", "num_blocks": BLOCKS_ADDED},
        "method": {"kind": "freeze", "grown": True},
        **replay(0.75),
    },
}
OWN_TOKENS = 120_000
EVALUATED = 6_000
"""Characters of each held-out text: speeches have tens of thousands."""


@dataclass(frozen=True)
class World:
    """A base, what is new to it, and the tokens every row sees."""

    base: str
    new: str
    tokens: int
    is_own_text_kept: bool = False
    """What is to be kept is text that the base writes; else the embedded stories."""


def worlds(shared: Path) -> dict[str, World]:
    models = shared / "models"
    return {
        "tiny-clinic": World("builtin:tiny", "clinic", 100_000),
        "tiny-speeches": World("builtin:tiny", "corpus_state_union", 100_000),
        "babyllama-speeches": World(str(models / "babyllama-361"), "corpus_state_union", 100_000, is_own_text_kept=True),
        "stories260K-speeches": World(str(models / "stories260K"), "corpus_state_union", 100_000, is_own_text_kept=True),
    }


@dataclass(frozen=True)
class Case:
    """One run."""

    world: str
    row: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return "".join(c if c.isalnum() or c in "-." else "-" for c in f"{self.world}-{self.row}-{self.rate}-{self.seed}")


def new_text(world: World, shared: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(train, held out) sources of the new domain."""
    if world.new == "clinic":
        clinic = {"kind": "builtin", "name": "clinic"}
        return ({"source": clinic, "format": {"kind": "text"}}, {"source": {**clinic, "split": "test"}, "format": {"kind": "text"}})
    return _split((shared / "data" / f"{world.new}.jsonl").read_text(encoding="utf-8"), folder / world.new)


def kept_text(world: World, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(train, held out) sources of what is to be kept; the base writes its own once."""
    if not world.is_own_text_kept:
        stories = {"kind": "builtin", "name": "stories"}
        return ({"source": stories, "format": {"kind": "text"}}, {"source": {**stories, "split": "test"}, "format": {"kind": "text"}})
    path = folder / f"{Path(world.base).name}-own.jsonl"
    if not path.exists():
        from ftcli.data.sources.own_text import OwnText
        from ftcli.models.load import load_model
        from ftcli.models.settings import Model
        from ftcli.models.tokenizer import load_tokenizer
        from ftcli.training.own_text import write_own_text

        tokenizer = load_tokenizer(world.base)
        model = load_model(Model(base=world.base), tokenizer)
        write_own_text(model, tokenizer, OwnText(tokens=OWN_TOKENS, max_length=BLOCK), path, None)
    return _split(path.read_text(encoding="utf-8"), path.with_suffix(""))


def _split(text: str, place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sources of rows to train on, and of every eighth, the beginning of which is held out."""
    rows = [json.loads(line)["text"] for line in text.splitlines()]
    parts = {"train": [row for index, row in enumerate(rows) if index % 8], "test": [row[:EVALUATED] for row in rows[::8]]}
    found = []
    for part, texts in parts.items():
        path = place.with_name(f"{place.name}-{part}.jsonl")
        path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts), encoding="utf-8")
        found.append({"source": {"kind": "file", "path": str(path)}, "format": {"kind": "text"}})
    return found[0], found[1]


def recipe(case: Case, world: World, shared: Path, folder: Path, lr: float | None) -> dict[str, Any]:
    """The same recipe for all rows of a world, but for the row."""
    row = ROWS[case.row]
    train, test = new_text(world, shared, folder)
    kept, kept_test = kept_text(world, folder)
    sources = [{**train, "unit": "block", "name": "new"}]
    if "mixture" in row:
        sources.append({**kept, "unit": "block", "name": "old", "role": "replay"})
    objective = json.loads(json.dumps(row.get("objective", {"kind": "causal-lm"})))
    for regularizer in objective.get("regularize", ()):
        if regularizer["kind"] == "ewc":
            regularizer["rows"] = kept
    return {
        "version": 1,
        "name": case.name,
        "model": {"base": world.base, **({"grow": row["grow"]} if "grow" in row else {})},
        "data": {
            "train": sources,
            "evaluation": [
                {**test, "name": "new-test", "limit": 60},
                {**kept_test, "name": "kept", "role": "retained", "limit": 60},
            ],
            "max_length": BLOCK,
            "on_overflow": "split",
            **({"mixture": row["mixture"]} if "mixture" in row else {}),
        },
        "method": row.get("method", {"kind": "full"}),
        "objective": objective,
        "train": {
            "max_tokens": world.tokens,
            "global_batch_size": BATCH,
            "seed": case.seed,
            "schedule": {"kind": "cosine", "warmup_ratio": 0.05},
            **({} if lr is None else {"lr": lr}),
        },
        "every": {"log": 20, "save": 100_000},
        "output": str(folder / "runs" / case.name),
    }


def run_case(case: Case, world: World, shared: Path, folder: Path) -> None:
    """Train, and keep the figures; runs in a process of its own."""
    from ftcli.errors import RunError
    from ftcli.recipe.load import load_recipe
    from ftcli.reporting.live import Reporter
    from ftcli.training.run import run_recipe

    path, run = folder / f"{case.name}.yaml", folder / "runs" / case.name
    shutil.rmtree(run, ignore_errors=True)
    lr = None
    if case.rate != 1.0:
        default = json.loads((folder / f"{Case(case.world, case.row, 1.0, SEEDS[0]).name}.json").read_text())["lr"]
        lr = default * case.rate
    path.write_text(json.dumps(recipe(case, world, shared, folder, lr)))
    began = time.process_time()
    try:
        with Reporter(silent=True) as reporter:
            summary = run_recipe(load_recipe(path), reporter)
    except RunError as error:  # a rate that diverges is the worst of the sweep, not the end of it
        print(f"{case.name}: {error}", flush=True)
        (folder / f"{case.name}.json").write_text(json.dumps({"failed": str(error)}))
        return
    manifest = json.loads((run / "manifest.json").read_text())
    result = {
        "lr": manifest["lr"],
        "cpu_seconds": time.process_time() - began,
        "peak_bytes": manifest["peak_memory_bytes"],
        "trained": manifest["parameters"]["trainable"],
        "before": {name: found["bits_per_byte"] for name, found in summary["before"].items()},
        "after": {name: found["bits_per_byte"] for name, found in summary["after"].items()},
        "mixture": summary["mixture"],
    }
    (folder / f"{case.name}.json").write_text(json.dumps(result))
    shutil.rmtree(run)
    path.unlink()


def run_one(case: Case, world: World, shared: Path, folder: Path) -> None:
    """One run in a process of its own, unless its result is there; a run that fails stops the whole."""
    if (folder / f"{case.name}.json").exists():
        return
    began = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=run_case, args=(case, world, shared, folder))
    process.start()
    process.join()
    print(f"{case.name}: exit {process.exitcode}, {time.monotonic() - began:.0f} s", flush=True)
    if process.exitcode != 0:
        raise SystemExit(f"{case.name} failed")


def result_of(case: Case, folder: Path) -> dict[str, Any] | None:
    path = folder / f"{case.name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def mean_loss(result: dict[str, Any]) -> float:
    return statistics.mean(result["after"].values()) if "after" in result else math.inf


def next_rate(world: str, row: str, folder: Path) -> float | None:
    """A rate that is still to be tried: the first three, then whatever lies beyond the best while that is at the edge."""
    tried = [rate for rate in RATES if result_of(Case(world, row, rate, SEEDS[0]), folder) is not None]
    for rate in FIRST:
        if rate not in tried:
            return rate
    at = RATES.index(best_rate(world, row, folder) or 1.0)
    beyond = {min(tried): at - 1, max(tried): at + 1}.get(RATES[at])
    return RATES[beyond] if beyond is not None and 0 <= beyond < len(RATES) else None


def best_rate(world: str, row: str, folder: Path) -> float | None:
    """The rate of the lowest mean of both losses with the first seed; None where there is none yet."""
    found = {rate: result_of(Case(world, row, rate, SEEDS[0]), folder) for rate in RATES}
    known = {rate: mean_loss(result) for rate, result in found.items() if result is not None}
    return min(known, key=lambda rate: known[rate]) if known else None


def results(world: str, folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every row with the results of its best rate, one for each seed."""
    for row in ROWS:
        rate = best_rate(world, row, folder)
        if rate is not None:
            found = [result_of(Case(world, row, rate, seed), folder) for seed in SEEDS]
            yield row, [result for result in found if result is not None]


def table(folder: Path, names: list[str]) -> str:
    """Markdown, a table for every world, sorted by the mean of both losses."""
    parts = []
    for world in names:
        rows = sorted(results(world, folder), key=lambda item: statistics.mean(map(mean_loss, item[1])))
        if not rows:
            continue
        before = rows[0][1][0]["before"]
        lines = [
            f"### {world}\n",
            "| row | lr | new | kept | mean | trained | CPU s | seeds |\n|---|--:|--:|--:|--:|--:|--:|--:|",
            f"| (before) | | {before['new-test']:.3f} | {before['kept']:.3f} | {statistics.mean(before.values()):.3f} | | | |",
        ]
        for row, found in rows:
            new, old = (_spread([result["after"][name] for result in found]) for name in ("new-test", "kept"))
            mean = statistics.mean(map(mean_loss, found))
            seconds = statistics.mean(result["cpu_seconds"] for result in found if "cpu_seconds" in result)
            lines.append(
                f"| {row} | {found[0]['lr']:.2g} | {new} | {old} | {mean:.3f} | {found[0]['trained']:,} | {seconds:.0f} | {len(found)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def plot(folder: Path, names: list[str], path: Path) -> None:
    """New against retained text, one panel a world, with the line of those that nothing beats in both."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ftcli"
    from matplotlib import pyplot

    panels = [(world, list(results(world, folder))) for world in names]
    panels = [(world, rows) for world, rows in panels if rows]
    labelled: list[tuple[Any, list[tuple[float, float, str]]]] = []
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(6.4 * max(1, len(panels)), 5.4), squeeze=False)
    for axis, (world, rows) in zip(axes[0], panels, strict=False):
        points = [
            (statistics.mean(r["after"]["new-test"] for r in found), statistics.mean(r["after"]["kept"] for r in found), row)
            for row, found in rows
        ]
        for x, y, row in points:
            axis.plot(x, y, "o", markersize=4, color="#3366aa" if "+" not in row and " on " not in row else "#cc5522")
        front = sorted((x, y) for x, y, _ in points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b, _ in points))
        axis.plot(*zip(*front, strict=True), color="#999999", linewidth=0.8)
        axis.set(xlabel="bits per byte, new text", ylabel="bits per byte, text to be kept", title=world, yscale="log")
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted(lambda value, _: f"{value:g}")
        axis.grid(alpha=0.25)
        labelled.append((axis, points))
    figure.tight_layout()
    for axis, points in labelled:
        label(axis, points)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows, by parts of their names, with commas between")
    parser.add_argument("--worlds", default="tiny-clinic,tiny-speeches,babyllama-speeches,stories260K-speeches")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    every = worlds(options.shared.resolve())
    names = options.worlds.split(",")
    if not options.table:
        import peft  # noqa: F401 - imported once, for all the forks
        import torch
        import transformers  # noqa: F401

        torch.set_num_threads(1)
        rows = [row for row in ROWS if any(part in row for part in options.only.split(","))]
        for world in names:
            for row in rows:
                while (rate := next_rate(world, row, folder)) is not None:
                    run_one(Case(world, row, rate, SEEDS[0]), every[world], options.shared, folder)
                best = best_rate(world, row, folder)
                for seed in SEEDS[1:] if best is not None else ():
                    run_one(Case(world, row, best, seed), every[world], options.shared, folder)
    text = table(folder, names)
    (folder / "table.md").write_text(text, encoding="utf-8")
    plot(folder, names, folder / "forgetting.svg")
    print(text)


if __name__ == "__main__":
    main()
