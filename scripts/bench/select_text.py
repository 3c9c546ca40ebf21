"""Ways of choosing text, measured: precision on a pool with planted rows, and what training on the chosen rows is worth.

    python scripts/bench/select_text.py precision --shared ../shared -o runs/select          every way on every task, then the table
    python scripts/bench/select_text.py tapt --shared ../shared -o runs/select-tapt          selected against random rows, same size
    python scripts/bench/select_text.py precision -o runs/select --table                     only the table of what is there

`precision`: one pool of rows from ten public data sets and the embedded ones. For each task, `--gold` rows of one data set are the
task set and are not in the pool; all other rows of that data set are planted. Precision at k is the share of planted rows among the k
best; k is the number of planted rows, and 100. Chance is their share of the pool. Seeds draw task set and pool anew.
`tapt`: the base is trained on the task set and on `--bytes` of text that a way chose from the pool, the best first (`random`: drawn;
`planted`: rows of the task's own data set; `none`: the task set alone). The measure is bits per byte on rows of the task's
data set that are in neither. Intervals of 95 % are from a paired bootstrap over these rows, within seeds, of the difference to `random`.
Results are kept: a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

K = 100
RESAMPLES = 2000
MAX_CHARS = 600
"""Of a row: longer texts are cut into pieces at paragraphs or sentences."""


@dataclass(frozen=True)
class Way:
    """One row of the table."""

    name: str
    options: dict[str, Any]


WAYS = (
    Way("random", {"by": "random"}),
    Way("ngrams", {"by": "ngrams"}),
    Way("perplexity", {"by": "perplexity"}),
    Way("embeddings", {"by": "embeddings", "model": "builtin:tiny"}),
)
GOLD_FILES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "banking": ("banking77_train.jsonl", lambda row: row["text"]),
    "assistant": ("clinc150_small_train.jsonl", lambda row: row["text"]),
    "commands": ("snips_train.jsonl", lambda row: row["text"]),
    "reviews": ("sentence_polarity.jsonl", lambda row: row["text"]),
    "mathematics": ("gsm8k_train.jsonl", lambda row: row["messages"][0]["content"]),
    "arithmetic": ("svamp.jsonl", lambda row: row["prompt"]),
    "shakespeare": ("corpus_tinyshakespeare.jsonl", lambda row: row["text"]),
    "tales": ("corpus_grimm.jsonl", lambda row: row["text"]),
    "addresses": ("corpus_inaugural.jsonl", lambda row: row["text"]),
    "state of the union": ("corpus_state_union.jsonl", lambda row: row["text"]),
}
TASKS = ("banking", "mathematics", "reviews", "shakespeare", "addresses")
"""Each has a neighbour in the pool that is easily taken for it: assistant, arithmetic, -, tales, state of the union."""


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of at most about `MAX_CHARS` characters, cut at line ends and ends of sentences."""
    piece = ""
    for sentence in text.replace("\n", " \n").replace(". ", ".\0").split("\0"):
        if piece and len(piece) + len(sentence) > MAX_CHARS:
            yield piece.strip()
            piece = ""
        piece += sentence + " "
        if len(piece) > MAX_CHARS:
            yield piece[:MAX_CHARS].strip()
            piece = ""
    if piece.strip():
        yield piece.strip()


def read_kinds(shared: Path) -> dict[str, list[str]]:
    """Different texts of each data set, at least four words long."""
    kinds: dict[str, list[str]] = {}
    for name, (file, text_of) in GOLD_FILES.items():
        rows = read_results(shared / "data" / file)
        pieces = dict.fromkeys(piece for row in rows for piece in pieces_of(text_of(row)) if len(piece.split()) > 3)
        kinds[name] = list(pieces)
    return kinds


@dataclass(frozen=True)
class Trial:
    """A task set, a pool with planted rows, and rows kept back, as files."""

    gold: Path
    pool: Path
    test: Path
    planted: int
    size: int


def make_trial(kinds: dict[str, list[str]], task: str, arguments: argparse.Namespace, seed: int, folder: Path) -> Trial:
    """The files of one task and seed."""
    generator = random.Random(f"{seed}/{task}")
    drawn = {name: generator.sample(rows, len(rows)) for name, rows in kinds.items()}
    own = drawn.pop(task)
    gold, rest = own[: arguments.gold], own[arguments.gold :]
    test, planted = rest[: arguments.test], rest[arguments.test :][: arguments.planted]
    rows = [(task, text) for text in planted] + [(name, text) for name, texts in drawn.items() for text in texts[: arguments.others]]
    generator.shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"gold": [(task, text) for text in gold], "pool": rows, "test": [(task, text) for text in test]}
    for name, content in files.items():
        lines = [json.dumps({"text": text, "kind": kind}) for kind, text in content]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Trial(folder / "gold.jsonl", folder / "pool.jsonl", folder / "test.jsonl", len(planted), len(rows))


def ranked_kinds(trial: Trial, way: Way, count: int, seed: int) -> tuple[list[str], float]:
    """(kind of each chosen row, best first; seconds of CPU)."""
    from ftcli.data.select.pool import Pool, open_sources
    from ftcli.data.select.run import Search, Selection

    pool, gold = (Pool(open_sources([str(path)])) for path in (trial.pool, trial.gold))
    began = time.process_time()
    search = Search(Selection(pool, gold, count, seed=seed, **way.options))
    search.score_pool()
    seconds = time.process_time() - began
    assert search.best is not None
    kinds = [row["kind"] for _, _, row in pool.rows()]
    return [kinds[candidate.index] for candidate in search.best.chosen()[0]], seconds


def precision(arguments: argparse.Namespace) -> None:
    """Every way on every task and seed, kept in precision.jsonl."""
    results = arguments.output / "precision.jsonl"
    arguments.output.mkdir(parents=True, exist_ok=True)
    done = {(row["way"], row["task"], row["seed"]) for row in read_results(results)}
    kinds = {} if arguments.table else read_kinds(arguments.shared)
    for seed in [] if arguments.table else arguments.seeds:
        for task in arguments.tasks:
            trial = make_trial(kinds, task, arguments, seed, arguments.output / f"{task}-{seed}")
            for way in WAYS:
                if (way.name, task, seed) in done or (arguments.ways and way.name not in arguments.ways):
                    continue
                found, seconds = ranked_kinds(trial, way, trial.planted, seed)
                record = {
                    "way": way.name,
                    "task": task,
                    "seed": seed,
                    "at_100": statistics.fmean(kind == task for kind in found[:K]),
                    "at_all": sum(kind == task for kind in found) / trial.planted,
                    "chance": trial.planted / trial.size,
                    "rows": trial.size,
                    "seconds": seconds,
                }
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)
    print("\n".join(precision_table(read_results(results), arguments.tasks)))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def precision_table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[str]:
    """Markdown: precision at the number of planted rows, and at 100, mean over seeds; range over seeds where there are several."""
    lines = [f"| way | {' | '.join(tasks)} | mean | rows per CPU second |", f"|---|{'--:|' * (len(tasks) + 2)}"]
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way.name]
        if not mine:
            continue
        cells = []
        for task in tasks:
            found = [row for row in mine if row["task"] == task]
            cells.append(f"{_mean(found, 'at_all'):.2f} / {_mean(found, 'at_100'):.2f}" if found else "-")
        rate = statistics.median(row["rows"] / row["seconds"] for row in mine)
        lines.append(f"| {way.name} | {' | '.join(cells)} | {_mean(mine, 'at_all'):.3f} / {_mean(mine, 'at_100'):.3f} | {rate:,.0f} |")
    return lines


def tapt(arguments: argparse.Namespace) -> None:
    """Every way's rows trained on, kept in tapt.jsonl with the bits of every test row."""
    results = arguments.output / "tapt.jsonl"
    arguments.output.mkdir(parents=True, exist_ok=True)
    done = {(row["arm"], row["task"], row["seed"]) for row in read_results(results)}
    kinds = {} if arguments.table else read_kinds(arguments.shared)
    for seed in [] if arguments.table else arguments.seeds:
        for task in arguments.tasks:
            folder = arguments.output / f"{task}-{seed}"
            trial = make_trial(kinds, task, arguments, seed, folder)
            for arm in ("none", "planted", *(way.name for way in WAYS)):
                if (arm, task, seed) in done or (arguments.ways and arm not in arguments.ways):
                    continue
                texts = chosen_for(trial, arm, task, arguments.bytes, seed)
                record = {"arm": arm, "task": task, "seed": seed, "rows": len(texts), **trained_on(trial, texts, arguments, seed, folder)}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                print(json.dumps({key: value for key, value in record.items() if key not in ("bits", "sizes")}), flush=True)
    print("\n".join(tapt_table(read_results(results), arguments.tasks)))


def chosen_for(trial: Trial, arm: str, task: str, num_bytes: int, seed: int) -> list[str]:
    """The texts that an arm adds to the task set: the best first, until they have `num_bytes`."""
    from ftcli.data.select.pool import Pool, open_sources
    from ftcli.data.select.run import Search, Selection

    rows = read_results(trial.pool)
    if arm == "none":
        return []
    if arm == "planted":
        ranked = [row["text"] for row in rows if row["kind"] == task]
    else:
        pool, gold = (Pool(open_sources([str(path)])) for path in (trial.pool, trial.gold))
        way = next(way for way in WAYS if way.name == arm)
        search = Search(Selection(pool, gold, trial.size, seed=seed, **way.options))
        search.score_pool()
        assert search.best is not None
        ranked = [rows[candidate.index]["text"] for candidate in search.best.chosen()[0]]
    taken: list[str] = []
    while ranked and sum(len(text.encode()) for text in taken) < num_bytes:
        taken.append(ranked.pop(0))
    return taken


def blocks_of(texts: Sequence[str]) -> list[str]:
    """The texts in blocks of about `MAX_CHARS`, so that arms with short and with long rows make the same number of updates."""
    blocks: list[str] = []
    for text in texts:
        if blocks and len(blocks[-1]) + len(text) <= MAX_CHARS * 1.25:
            blocks[-1] += "\n" + text
        else:
            blocks.append(text)
    return blocks


def trained_on(trial: Trial, texts: Sequence[str], arguments: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Bits of every test row under the base trained on the task set and `texts`."""
    from ftcli.data.select.models import TextModel
    from ftcli.recipe.load import load_recipe
    from ftcli.reporting.live import Reporter
    from ftcli.training.run import run_recipe

    gold, test = ([row["text"] for row in read_results(path)] for path in (trial.gold, trial.test))
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*gold, *blocks_of(texts)]), encoding="utf-8")
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    recipe = {
        "version": 1,
        "name": "select-tapt",
        "model": {"base": arguments.base},
        "data": {"train": [{"source": {"kind": "file", "path": "train.jsonl"}, "format": {"kind": "text"}}], "holdout": 0.0},
        "method": {"kind": "full"},
        "train": {"epochs": arguments.epochs, "global_batch_size": 8, "seed": seed, "lr": arguments.lr},
        "every": {"log": 1000, "save": 100000},
        "output": str(run),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    with Reporter(silent=True) as reporter:
        run_recipe(load_recipe(folder / "recipe.yaml"), reporter)
    per_byte = TextModel(str(run / "model"), max_tokens=1024, has_head=True).bits_per_byte(test)
    shutil.rmtree(run)
    sizes = [len(text.encode()) for text in test]
    bits = [float(value) * size for value, size in zip(per_byte, sizes, strict=True)]
    return {"train_bytes": sum(len(text.encode()) for text in texts), "bits_per_byte": sum(bits) / sum(sizes), "bits": bits, "sizes": sizes}


def tapt_table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[str]:
    """Markdown: bits per byte of each arm, and its difference to random rows with the interval."""
    lines = [f"| arm | {' | '.join(tasks)} |", f"|---|{'--:|' * len(tasks)}"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for task in tasks:
            mine, floor = ({row["seed"]: row for row in rows if row["arm"] == name and row["task"] == task} for name in (arm, "random"))
            seeds = sorted(set(mine) & set(floor))
            if not seeds:
                cells.append("-")
                continue
            value = statistics.fmean(mine[seed]["bits_per_byte"] for seed in seeds)
            change, low, high = difference([mine[seed] for seed in seeds], [floor[seed] for seed in seeds])
            cells.append(f"{value:.3f}" if arm == "random" else f"{value:.3f} ({change:+.3f}, {low:+.3f} to {high:+.3f})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def difference(mine: Sequence[dict[str, Any]], floor: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """(bits per byte by which `mine` differ from `floor`, mean over seeds, low and high end of the interval)."""
    import numpy as np

    generator = np.random.default_rng(0)
    draws = np.zeros(RESAMPLES)
    change = 0.0
    for own, other in zip(mine, floor, strict=True):
        bits, sizes = np.array(own["bits"]) - np.array(other["bits"]), np.array(own["sizes"])
        places = generator.integers(len(bits), size=(RESAMPLES, len(bits)))
        draws += bits[places].sum(axis=1) / sizes[places].sum(axis=1) / len(mine)
        change += float(bits.sum() / sizes.sum()) / len(mine)
    low, high = np.quantile(draws, [0.025, 0.975])
    return change, float(low), float(high)


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["precision", "tapt"])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument("--ways", type=lambda text: text.split(";"), default=[])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[17, 18, 19])
    parser.add_argument("--gold", type=int, default=100, help="rows of the task set")
    parser.add_argument("--planted", type=int, default=500, help="rows of the task's data set in the pool")
    parser.add_argument("--test", type=int, default=200, help="rows of the task's data set that are kept back")
    parser.add_argument("--others", type=int, default=700, help="rows of each other data set in the pool")
    parser.add_argument("--table", action="store_true", help="only the table of what is there")
    parser.add_argument("--base", default="builtin:tiny", help="of tapt")
    parser.add_argument("--bytes", type=int, default=60_000, help="of text beside the task set (tapt)")
    parser.add_argument("--epochs", type=int, default=3, help="of tapt")
    parser.add_argument("--lr", type=float, default=3e-4, help="of tapt")
    arguments = parser.parse_args()
    (precision if arguments.what == "precision" else tapt)(arguments)


if __name__ == "__main__":
    main()
