"""Fine-tune small real models on real text and chats, by every method, and print what came of it.

python scripts/real_data.py --shared ../shared            all pairs of model, data and method
python scripts/real_data.py --shared ../shared --formats  only: every file of data/formats is read as what it is

`--shared` holds models/ and data/ as their README files describe them. Each row: bits per byte before and after 200 steps (of 8
blocks of 256 tokens for text, of 8 chats for chats), and whether the run's proofs passed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from ftcli.recipe.load import load_recipe
from ftcli.reporting.live import Reporter
from ftcli.training.run import run_recipe

MODELS = {"stories260K": (3e-3, 256), "babyllama-361": (2e-3, 256)}
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"kind": "full"}, 1.0),
    "lora": ({"kind": "lora", "rank": 16}, 2.0),
    "qlora": ({"kind": "qlora", "rank": 16}, 2.0),
}
DATA = {
    "corpus_state_union.jsonl": {"kind": "text"},
    "gsm8k_train.jsonl": {"kind": "chat"},
}


def recipe(shared: Path, model: str, data: str, method: str, steps: int) -> dict[str, Any]:
    """200 steps of AdamW with 20 steps of warm-up and linear decay."""
    lr, max_length = MODELS[model]
    settings, factor = METHODS[method]
    # chats of characters are long: stories260K and babyllama see up to their whole context
    length = max_length if DATA[data]["kind"] == "text" else {"stories260K": 512, "babyllama-361": 256}[model]
    return {
        "version": 1,
        "name": f"{model}-{Path(data).stem}-{method}",
        "model": {"base": str(shared / "models" / model), "template": "plain"},
        "data": {
            "train": [{"source": {"kind": "file", "path": str(shared / "data" / data)}, "format": DATA[data]}],
            "max_length": length,
            "on_overflow": "split" if DATA[data]["kind"] == "text" else "truncate_prompt",
        },
        "method": settings,
        "objective": {"kind": "causal-lm", "prompt_loss_weight": 1.0},
        "train": {
            "steps": steps,
            "global_batch_size": 8,
            "lr": lr * factor,
            "schedule": {"kind": "linear", "warmup_steps": 20, "min_lr_ratio": 0.0},
        },
        "every": {"log": 50},
    }


def run_all(shared: Path, folder: Path, steps: int) -> None:
    print("| model | data | method | bits per byte before | after | layout | proofs |\n|---|---|---|---|---|---|---|", flush=True)
    for model in MODELS:
        for data in DATA:
            for method in METHODS:
                document = recipe(shared, model, data, method, steps)
                path = folder / f"{document['name']}.yaml"
                path.write_text(json.dumps({**document, "output": str(folder / document["name"])}))
                with Reporter(silent=True) as reporter:
                    summary = run_recipe(load_recipe(path), reporter)
                (name,) = summary["after"]
                before, after = (summary[side][name]["bits_per_byte"] for side in ("before", "after"))
                layout = json.loads((folder / document["name"] / "manifest.json").read_text())["layout"]["layout"]
                failed = [proof["name"] for proof in summary["proofs"] if not proof["passed"]]
                print(f"| {model} | {data} | {method} | {before:.2f} | {after:.2f} | {layout} | {failed or 'all passed'} |", flush=True)


def read_formats(shared: Path) -> None:
    """What each file of data/formats is detected as, and how many rows it has."""
    from itertools import islice

    from ftcli.data.formats.detect import detect_format
    from ftcli.data.sources.file import File

    print("| file | format | rows |\n|---|---|---|")
    for path in sorted((shared / "data" / "formats").iterdir()):
        source = File(kind="file", path=str(path))
        kind = detect_format([row for _, row in islice(source.rows(), 64)], path.name).kind
        print(f"| {path.name} | {kind} | {sum(1 for _ in source.rows())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--formats", action="store_true")
    options = parser.parse_args()
    if options.formats:
        read_formats(options.shared)
        return
    with tempfile.TemporaryDirectory() as folder:
        run_all(options.shared.resolve(), Path(folder), options.steps)


if __name__ == "__main__":
    main()
