"""Held-out loss of short runs at several learning rates, for PEFT's types and their neighbours: where default learning rates come from.

`python scripts/bench/peft_lr.py --methods peft:loha,peft:vera,ia3 --lrs 1e-3,1e-2 --steps 40`: one line of JSON a run.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLES, HELD_OUT = 320, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", required=True, help="kinds, or peft:TYPE, with commas between them")
    parser.add_argument("--lrs", required=True, help="peak learning rates, with commas between them")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="examples a step")
    options = parser.parse_args()
    bench = Bench(options.steps, options.batch)
    for name in options.methods.split(","):
        for lr in map(float, options.lrs.split(",")):
            print(json.dumps(bench.run(name, lr)), flush=True)


class Bench:
    """The order task on builtin:tiny, read once."""

    def __init__(self, steps: int, batch: int) -> None:
        from ftcli.recipe.load import load_recipe
        from ftcli.training.assemble import assemble_data, load_base, make_accelerator

        document = {
            "version": 1,
            "name": "peft-lr",
            "model": {"base": "builtin:tiny"},
            "data": {
                "train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": EXAMPLES}],
                "evaluation": [{"source": {"kind": "builtin", "name": "orders", "split": "test"}, "limit": HELD_OUT}],
                "max_length": 512,
            },
            "train": {"steps": steps, "global_batch_size": batch, "schedule": {"kind": "linear", "warmup_ratio": 0.1}},
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(json.dumps(document))
            self.recipe = load_recipe(path).recipe
        self.data = assemble_data(self.recipe, None)
        self.accelerator = make_accelerator(self.recipe, None)
        self.base = load_base(self.recipe, self.data.tokenizer, self.accelerator.device)

    def run(self, name: str, lr: float) -> dict[str, Any]:
        """Train once, and measure the loss on held-out orders."""
        from pydantic import TypeAdapter

        from ftcli.evaluation.loss import measure_loss
        from ftcli.layout.model import TreeModel
        from ftcli.layout.probe import LayoutChoice
        from ftcli.methods import Method
        from ftcli.methods.context import AttachContext
        from ftcli.training.assemble import ModelParts, assemble_learner, count_parameters
        from ftcli.training.step import NonFiniteError, optimizer_step

        kind, _, kind_type = name.partition(":")
        method = TypeAdapter(Method).validate_python({"kind": kind} | ({"type": kind_type} if kind_type else {}))
        recipe = self.recipe.model_copy(update={"method": method})
        module = method.attach(copy.deepcopy(self.base), AttachContext(seed=5))
        parts = ModelParts(module, TreeModel(module, "forest"), LayoutChoice("forest", "a Llama"), lr)
        learner, batches = assemble_learner(recipe, self.data, parts, self.accelerator)
        learner.model.train()
        num_steps, began = learner.num_steps, time.monotonic()
        try:
            for step in range(1, num_steps + 1):
                optimizer_step(learner, batches.at(step), recipe.train.schedule.factor_at(step, num_steps))
        except NonFiniteError as error:
            return {"method": name, "lr": lr, "loss": None, "error": str(error)}
        seconds = time.monotonic() - began
        store = self.data.prepared.evaluation[0]
        options: dict[str, Any] = {"layout": "forest", "micro_batch_tokens": 8192, "pad_id": 0}
        measured = measure_loss(self.accelerator, learner.model, recipe.objective, store, **options)
        trained = count_parameters(module)[0]
        return {"method": name, "lr": lr, "loss": round(measured.to_json()["loss"], 4), "trained": trained, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
