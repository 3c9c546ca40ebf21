"""The share of this machine's own matrix-product rate that a training step reaches, and where the rest goes.

    python scripts/bench/rate.py [--method lora] [--threads 2] [--profile]

Operations are counted from the shapes: what the step has to multiply, and nothing else. Per token and weight matrix of n numbers:
2n forward and 2n for the gradient of the input; a weight that trains takes 2n more. Low-rank factors train: 6n. The head counts
for targets only, and a frozen head that keeps its gradient from the forward pass takes 4n, one that trains 6n. The gradient of the
input of the first layer is not needed where the embedding is frozen; that is not subtracted. Causal attention takes 4 x the sum
over examples of (length^2 / 2) x hidden size forward and twice that backward. The rate is that of a large float32 product.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ftcli_worker import assemble
from inputs import LLAMA, SHARED, Setting, make_model, write_chats
from meter import processor_seconds

if TYPE_CHECKING:
    from ftcli.training.batches import StepBatches

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
    "softmax of the head": ("aten::exp_", "aten::exp", "aten::sub_", "aten::amax", "aten::logsumexp", "aten::log", "aten::gather"),
    "4-bit weights": ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise"),
    "optimizer": ("aten::_fused_adamw_", "aten::_foreach_norm", "aten::_foreach_mul_"),
    "products and sums by element": ("aten::mul", "aten::mul_", "aten::add", "aten::add_", "aten::sub", "aten::neg", "aten::div"),
    "other functions by element": ("aten::silu", "aten::silu_backward", "aten::pow", "aten::mean", "aten::rsqrt", "aten::sum"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index", "aten::index_select", "aten::embedding"),
}


def matrix_numbers(rank: int) -> tuple[int, int, int]:
    """Numbers in the decoder's weight matrices, in their low-rank factors, and in the head."""
    size, inner, layers = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["num_hidden_layers"]
    keys = size * LLAMA["num_key_value_heads"] // LLAMA["num_attention_heads"]
    shapes = [(size, size), (size, keys), (size, keys), (size, size), (size, inner), (size, inner), (inner, size)]
    full = layers * sum(rows * columns for rows, columns in shapes)
    low = layers * sum(rank * (rows + columns) for rows, columns in shapes)
    return full, low, size * LLAMA["vocab_size"]


def operations(batches: StepBatches, method: str, rank: int) -> float:
    """Floating-point operations that the step needs, an addition and a multiplication counted as two."""
    full, low, head = matrix_numbers(rank)
    lengths = [length for batch in batches.micro_batches if batch.forest is not None for length in batch.forest.lengths]
    attention = 3 * 4 * sum(length**2 / 2 for length in lengths) * LLAMA["hidden_size"] * LLAMA["num_hidden_layers"]
    per_token = 6 * full if method == "full" else 4 * full + 6 * low
    per_target = (6 if method == "full" else 4) * head
    return float(per_token * batches.num_tokens + per_target * batches.num_targets + attention)


def product_rate(size: int = 2048, seconds: float = 4.0) -> float:
    """Operations per processor second of a large float32 product: the median over `seconds`."""
    import torch

    left, right, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 5:
        began = processor_seconds()
        for _ in range(10):
            torch.mm(left, right, out=out)
        rates.append(10 * 2 * size**3 / (processor_seconds() - began))
    return median(rates)


def grouped(events: Any) -> dict[str, float]:
    """Share of the operators' own time by group."""
    names = {name: group for group, members in GROUPS.items() for name in members}
    sums: dict[str, float] = defaultdict(float)
    for event in events:
        sums[names.get(event.key, "the rest: Python, views, allocation")] += event.self_cpu_time_total
    total = sum(sums.values())
    return {group: value / total for group, value in sorted(sums.items(), key=lambda item: -item[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora", choices=["lora", "full", "qlora"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="also where the time of two more steps goes")
    arguments = parser.parse_args()
    import torch

    from ftcli.training.step import optimizer_step

    torch.set_num_threads(arguments.threads)
    warm_up = 2
    setting = Setting(arguments.method, warm_up + arguments.steps + 2, warm_up, arguments.threads, 1e-3)
    with tempfile.TemporaryDirectory(prefix="ftcli-bench-") as name:
        folder = Path(name)
        make_model(folder, SHARED / "data" / "tokenizers" / "mistral-v3")
        write_chats(folder, SHARED / "data" / "gsm8k_train.jsonl", setting)
        learner, source, _ = assemble(folder, setting, {})
        learner.model.train()
        rates, shares = [], []
        for step in range(1, warm_up + arguments.steps + 1):
            batches = source.at(step)
            # Measured beside every step, so that whatever else the machine does slows both.
            reference = product_rate(seconds=0.5)
            began = processor_seconds()
            optimizer_step(learner, batches, 1.0)
            rate = operations(batches, setting.method, setting.rank) / (processor_seconds() - began)
            if step > warm_up:
                rates.append(rate)
                shares.append(rate / reference)
        print(f"{setting.method}: {median(rates) / 1e9:.0f} G operations per CPU-second, {median(shares):.0%} of a large product's rate")
        if arguments.profile:
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                for step in range(warm_up + arguments.steps + 1, setting.steps + 1):
                    optimizer_step(learner, source.at(step), 1.0)
            for group, share in grouped(profiled.key_averages()).items():
                print(f"  {share:6.1%}  {group}")


if __name__ == "__main__":
    main()
