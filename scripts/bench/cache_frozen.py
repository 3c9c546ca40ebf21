"""How much faster a step is when frozen lower layers are read from the disk: one process, steps with and without in turn.

    python scripts/bench/cache_frozen.py [--steps 20] [--top-layers 2] [--base builtin:tiny]

Prints one line of JSON: median seconds of a step without and with the cache, their ratio, and the cache's size.
Both kinds of step see the same batches and make real updates, one right after the other, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftcli.training.batches import StepBatches
    from ftcli.training.step import Learner


def recipe_document(arguments: argparse.Namespace) -> dict[str, Any]:
    """As a user would write it; the run is two epochs, so that every example is seen again."""
    return {
        "version": 1,
        "name": "bench",
        "model": {"base": arguments.base},
        "data": {
            "train": [{"source": {"kind": "builtin", "name": "orders"}, "limit": arguments.steps * arguments.batch_size}],
            "holdout": 0.0,
            "max_length": 512,
        },
        "method": {"kind": "freeze", "top_layers": arguments.top_layers, "cache_frozen": True},
        "train": {"epochs": 2, "global_batch_size": arguments.batch_size, "device": arguments.device},
    }


def seconds_of(learner: Learner, batches: StepBatches) -> float:
    """Of one update, until the device is done."""
    import torch

    from ftcli.training.step import optimizer_step

    began = time.perf_counter()
    optimizer_step(learner, batches, 1.0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Fill the cache in the first epoch, then take every step of the second both ways."""
    from ftcli.recipe.recipe import Recipe
    from ftcli.training.assemble import assemble_data, assemble_learner, assemble_model, make_accelerator
    from ftcli.training.frozen_cache import plan_frozen_cache

    recipe = Recipe.model_validate_json(json.dumps(recipe_document(arguments)))
    accelerator = make_accelerator(recipe, None)
    data = assemble_data(recipe, None)
    parts = assemble_model(recipe, data, accelerator)
    learner, source = assemble_learner(recipe, data, parts, accelerator)
    plan = plan_frozen_cache(recipe, data, parts, accelerator, folder, print)
    assert plan is not None, "every example is seen twice"
    cache = plan.open("one run")
    learner.model.train()
    half = data.order.num_steps // 2
    filling = [seconds_of(learner, source.at(step)) for step in range(1, half + 1)]
    without, with_cache = [], []
    for step in range(half + 1, 2 * half + 1):
        batches = source.at(step)
        parts.model.lower_layers = None
        without.append(seconds_of(learner, batches))
        parts.model.lower_layers = cache
        with_cache.append(seconds_of(learner, batches))
    ratios = [slow / fast for slow, fast in zip(without, with_cache, strict=True)]
    result = {
        "base": arguments.base,
        "layers_skipped": cache.boundary.num_lower,
        "layers_trained": arguments.top_layers,
        "steps": half,
        "first_epoch_seconds": round(statistics.median(filling), 4),
        "without_seconds": round(statistics.median(without), 4),
        "with_seconds": round(statistics.median(with_cache), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)[::2]],
        "cache_bytes": cache.num_bytes,
    }
    cache.remove()
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin:tiny", help="a base model")
    parser.add_argument("--top-layers", type=int, default=2, help="decoder layers that train")
    parser.add_argument("--steps", type=int, default=20, help="steps an epoch")
    parser.add_argument("--batch-size", type=int, default=16, help="examples a step")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments, Path(folder))))


if __name__ == "__main__":
    main()
