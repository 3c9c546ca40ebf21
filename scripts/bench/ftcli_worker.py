"""One measured run of ftcli: what `ftcli train` does between its checks and its proofs, with a meter as the only hook."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inputs import LORA_ALPHA_OVER_RANK, Setting
from meter import Meter, peak_bytes

if TYPE_CHECKING:
    from ftcli.training.batches import BatchSource, StepBatches
    from ftcli.training.loop import Progress
    from ftcli.training.step import Learner, StepResult


class MeterHook:
    """Hands every finished step to the meter."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def after_step(self, progress: Progress, batches: StepBatches, result: StepResult) -> None:
        self.meter.after_step(progress.step, batches.num_tokens, batches.num_targets)
        self.meter.losses.append(result.loss)


def recipe_document(folder: Path, setting: Setting) -> dict[str, Any]:
    """The recipe of this run, as a user would write it."""
    low_rank = {"rank": setting.rank, "alpha": LORA_ALPHA_OVER_RANK * setting.rank}
    method = {"kind": setting.method, **({} if setting.method == "full" else low_rank)}
    return {
        "version": 1,
        "name": "bench",
        "model": {"base": str(folder / "model")},
        "data": {
            "train": [{"source": {"kind": "file", "path": str(folder / "chats.jsonl")}, "format": {"kind": "chat"}}],
            "holdout": 0,
            "max_length": setting.max_length,
        },
        "method": method,
        "train": {
            "steps": setting.steps,
            "global_batch_size": setting.batch_size,
            "lr": setting.lr,
            "schedule": {"kind": "constant"},
            "max_grad_norm": setting.max_grad_norm,
            "seed": setting.seed,
            "device": "cpu",
        },
    }


def assemble(folder: Path, setting: Setting, changes: dict[str, Any]) -> tuple[Learner, BatchSource, int]:
    """Learner, batches and number of steps; `changes` go into the recipe's `train`."""
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.assemble import assemble_data, assemble_learner, assemble_model, make_accelerator

    document = recipe_document(folder, setting)
    document["train"].update(changes)
    recipe = Recipe.model_validate_json(json.dumps(document), context={"folder": folder})
    accelerator = make_accelerator(recipe, None)
    data = assemble_data(recipe, None)
    parts = assemble_model(recipe, data, accelerator)
    learner, batches = assemble_learner(recipe, data, parts, accelerator)
    print(f"layout: {parts.layout.layout} ({parts.layout.reason})")
    return learner, batches, data.order.num_steps


def main() -> None:
    """Arguments: setting file, changes to the recipe's `train` as JSON."""
    path, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    setting = Setting.read(path)
    import torch

    torch.set_num_threads(setting.threads)
    from ftcli.training.loop import Progress, train

    learner, batches, num_steps = assemble(path.parent, setting, changes)
    meter = Meter(setting.warm_up_steps)
    before = peak_bytes()
    train(learner, batches, lambda step, total: 1.0, Progress(num_steps=num_steps), [MeterHook(meter)])
    meter.report(peak_bytes_before_training=before)


if __name__ == "__main__":
    main()
