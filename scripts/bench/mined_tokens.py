"""What mined words are worth: tokens per byte, and bits per byte after the same number of trained tokens, with and without them.

    python scripts/bench/mined_tokens.py -o runs/mined [--tokens 160000] [--counts 0 8 32 128]

builtin:tiny is fine-tuned in full on the embedded clinical text, once for every count of mined words and every seed; the words are mined
from the training text alone, and figures are of held-out text and of the stories that the base knows. Equal compute is an equal number of
tokens: a text in fewer tokens is then seen a little more often, which is what mined words are for. Results are kept: a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

SEEDS = (17, 18, 19)
CLINIC = {"kind": "builtin", "name": "clinic"}
STORIES = {"kind": "builtin", "name": "stories", "split": "test"}


def recipe(count: int, seed: int, tokens: int, output: Path) -> dict[str, Any]:
    """The same for every count, but for the words."""
    text = {"kind": "text"}
    return {
        "version": 1,
        "name": output.name,
        "model": {"base": "builtin:tiny", **({"add_tokens": {"mine": count}} if count else {})},
        "data": {
            "train": [{"source": CLINIC, "format": text, "unit": "block"}],
            "evaluation": [
                {"source": {**CLINIC, "split": "test"}, "format": text, "name": "clinic-test"},
                {"source": STORIES, "format": text, "name": "stories", "role": "retained", "limit": 60},
            ],
            "max_length": 256,
        },
        "method": {"kind": "full"},
        "train": {"max_tokens": tokens, "global_batch_size": 8, "seed": seed},
        "every": {"log": 50, "save": 100_000},
        "output": str(output),
    }


def run_one(count: int, seed: int, tokens: int, folder: Path) -> dict[str, Any]:
    """The figures of one run, which is made if they are not there."""
    from ftcli.recipe.load import load_recipe
    from ftcli.reporting.live import Reporter
    from ftcli.training.run import run_recipe

    kept = folder / f"mine-{count}-{seed}-{tokens}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    run, path = folder / "runs" / kept.stem, kept.with_suffix(".yaml")
    shutil.rmtree(run, ignore_errors=True)
    path.write_text(json.dumps(recipe(count, seed, tokens, run)))
    with Reporter(silent=True) as reporter:
        summary = run_recipe(load_recipe(path), reporter)
    after = summary["after"]
    result = {name: after[name]["bits_per_byte"] for name in ("clinic-test", "stories")}
    # bits per byte are the loss in bits times the tokens of a byte
    result["tokens_per_byte"] = result["clinic-test"] * math.log(2) / after["clinic-test"]["loss"]
    kept.write_text(json.dumps(result))
    shutil.rmtree(run)
    print(f"{kept.stem}: {result}", flush=True)
    return result


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=160_000, help="trained tokens of every run")
    parser.add_argument("--counts", type=int, nargs="*", default=[0, 8, 32, 128])
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["| mined words | tokens per byte | clinic, bits per byte | stories | seeds |", "|--:|--:|--:|--:|--:|"]
    for count in arguments.counts:
        found = [run_one(count, seed, arguments.tokens, folder) for seed in SEEDS]
        new, kept = (spread([result[name] for result in found]) for name in ("clinic-test", "stories"))
        lines.append(f"| {count} | {found[0]['tokens_per_byte']:.4f} | {new} | {kept} | {len(found)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
