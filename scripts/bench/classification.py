"""What classifiers cost and reach on the embedded base: features against a head without cache, label words against a head.

    python scripts/bench/classification.py features      accuracy, and CPU seconds of 10 epochs with and without kept features
    python scripts/bench/classification.py label-words   accuracy, and tokens computed against one pass for each label

Rows are drawn by a fixed seed from the files of `FTCLI_SHARED` (or ../shared): ROWS_OF says how many to train on, as many as TEST
are held out. Seconds are CPU seconds of this process for training: features of the training rows and every step, without reading
data, loading the model and evaluating.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftcli.evaluation.loss import measure_loss
from ftcli.recipe.load import load_recipe
from ftcli.training.assemble import assemble_data, assemble_learner, assemble_model, featured, make_accelerator, settled
from ftcli.training.step import optimizer_step

SHARED = Path(os.environ.get("FTCLI_SHARED", Path(__file__).parents[3] / "shared")) / "data"
ROWS_OF = {"sentence_polarity": 500, "banking77_train": 770, "snips_train": 350, "clinc150_small_train": 450}
MORE_ROWS = 4000
TEST = 400
FIRST_LABELS = {"clinc150_small_train": 30}
EPOCHS = 10


def subset(name: str, folder: Path, count: int) -> tuple[Path, Path]:
    """Files of training and test rows, drawn by a fixed seed; of some data the rows of the first so many labels only."""
    rows = [json.loads(line) for line in (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["label"] for row in rows})[: FIRST_LABELS.get(name)]
    rows = [{"text": row["text"].strip(), "label": row["label"]} for row in rows if row["label"] in labels]
    random.Random(17).shuffle(rows)
    parts = {"train": rows[TEST : TEST + count], "test": rows[:TEST]}
    for part, chosen in parts.items():
        (folder / f"{name}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return folder / f"{name}-train.jsonl", folder / f"{name}-test.jsonl"


def measured(
    folder: Path,
    name: str,
    method: dict[str, Any],
    objective: dict[str, Any],
    template: str | None = None,
    rows: int | None = None,
    **train: Any,
) -> dict[str, Any]:
    """Train once; accuracy, macro-F1, and what it took."""
    train_file, test_file = subset(name, folder, rows or ROWS_OF[name])
    layout = {"kind": "label", "template": template}
    document = {
        "version": 1,
        "name": "bench",
        "model": {"base": "builtin:tiny"},
        "data": {
            "train": [{"source": {"kind": "file", "path": str(train_file)}, "format": layout}],
            "evaluation": [{"source": {"kind": "file", "path": str(test_file)}, "format": layout}],
        },
        "method": method,
        "objective": {"kind": "classification", "unseen_labels": "count-as-wrong", **objective},
        "train": {"global_batch_size": 32, "schedule": {"kind": "linear", "warmup_ratio": 0.05}, **train},
    }
    (folder / "bench.yaml").write_text(json.dumps(document), encoding="utf-8")
    recipe = load_recipe(folder / "bench.yaml").recipe
    data = assemble_data(recipe, None)
    recipe = settled(recipe, data)
    accelerator = make_accelerator(recipe, None)
    parts = assemble_model(recipe, data, accelerator)
    began = time.process_time()
    whole, data = data, featured(recipe, replace(data, prepared=replace(data.prepared, evaluation=[])), parts, None)
    learner, batches = assemble_learner(recipe, data, parts, accelerator)
    learner.model.train()
    num_steps, tokens = data.order.num_steps, 0
    for step in range(1, num_steps + 1):
        batch = batches.at(step)
        tokens += batch.num_tokens
        optimizer_step(learner, batch, recipe.train.schedule.factor_at(step, num_steps))
    seconds = time.process_time() - began
    data = featured(recipe, whole, parts, None)
    options: dict[str, Any] = {"layout": parts.layout.layout, "micro_batch_tokens": 4096, "pad_id": 0}
    loss = measure_loss(accelerator, learner.model, recipe.objective, data.prepared.evaluation[0], **options)
    assert loss.scores is not None
    assert loss.labels is not None
    found = recipe.objective.measures(loss.scores, loss.labels)
    return {**found, "seconds": seconds, "tokens": tokens, "recipe": recipe, "data": data}


def bench_features(folder: Path) -> None:
    """Accuracy and seconds of the classifiers over kept features, and of a head that trains without them."""
    for name in ("sentence_polarity", "banking77_train"):
        baseline = measured(folder, name, {"kind": "head"}, {}, epochs=EPOCHS)
        show(name, f"head, {EPOCHS} epochs, not kept", baseline, baseline["seconds"])
        for label, method in {
            f"features, steps, {EPOCHS} epochs": {"solver": "steps"},
            "features, torch, linear": {},
            "features, torch, svm": {"classifier": "svm"},
            "features, torch, mlp": {"classifier": "mlp", "strength": 0.1},
            "features, sklearn, linear": {"solver": "sklearn"},
        }.items():
            os.environ["FTCLI_CACHE"] = str(folder / f"cache-{abs(hash(label))}")  # each computes its own features
            epochs = EPOCHS if method.get("solver") == "steps" else None
            train = {"epochs": epochs} if epochs else {"steps": 1}
            show(name, label, measured(folder, name, {"kind": "features", **method}, {}, **train), baseline["seconds"])
        # Whoever comes second finds the features there.
        show(name, "features, torch, linear, kept", measured(folder, name, {"kind": "features"}, {}, steps=1), baseline["seconds"])
        more = measured(folder, name, {"kind": "features"}, {}, rows=MORE_ROWS, steps=1)
        show(name, f"features, torch, linear, {MORE_ROWS} rows", more, more["seconds"])


def show(name: str, label: str, found: dict[str, Any], baseline: float) -> None:
    print(
        f"{name:22} {label:34} accuracy {found['accuracy']:.3f}  macro-F1 {found['macro_f1']:.3f}  ece {found['ece']:.3f}  "
        f"{found['seconds']:7.1f} s  {baseline / found['seconds']:5.1f}x",
        flush=True,
    )


def bench_label_words(folder: Path) -> None:
    """Accuracy of both readouts after the same steps, and the tokens that the forest saves."""
    for name, template in {"snips_train": "{text}\nIntent:", "clinc150_small_train": "{text}\nIntent:"}.items():
        for readout in ("head", "label-words"):
            found = measured(folder, name, {"kind": "lora"}, {"readout": readout}, template, epochs=3)
            show(name, f"lora, {readout}, 3 epochs", found, found["seconds"])
        recipe, data = found["recipe"], found["data"]
        words = recipe.objective._words.ids
        lengths = [int(length) for store in data.prepared.train for length in store.lengths]
        alone = sum(length * len(words) + sum(map(len, words)) for length in lengths)
        forest = sum(length + sum(map(len, words)) for length in lengths)
        print(f"{name:22} {len(words)} labels: {forest} tokens an epoch, {alone} with one pass a label ({alone / forest:.1f}x)", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.environ["FTCLI_CACHE"] = str(Path(place) / "cache")
        {"features": bench_features, "label-words": bench_label_words}[sys.argv[1]](Path(place))
