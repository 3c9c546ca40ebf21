"""Greedy answers by ftcli's batched generation and by transformers' own `generate`, interleaved: same tokens, and throughput.

    python scripts/bench/generate_vs_transformers.py [--shared ../shared] [--rows 64] [--new 48] [--rounds 3] [--model FOLDER]

Both sides hold the same model in one process, are given the same prompts (questions of gsm8k) and take turns; each makes the
likeliest token until its end token or `--new` tokens. transformers is called as its documentation shows for batches: prompts in the
order of the file, left-padded, `--batch` rows at a time; ftcli, which sorts them by length, is given the same number of rows. Rates
are by wall time and by processor time, which other work on the machine disturbs less; tokenising and decoding are included. Tokens
must be the same, up to a step where the two likeliest logits are nearer to each other than floating point can tell: such rows are
counted and shown with that gap.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIG = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}


def make_model(folder: Path, shared: Path) -> Path:
    """A random Llama of 26 M parameters, whose likeliest token is far from a coin's toss."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ftcli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared / "data" / "tokenizers" / "gpt2"))
    tokenizer.save(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=tokenizer.vocab_size, **CONFIG, **ends)).save_pretrained(folder)
    return folder


def by_transformers(model: Any, tokenizer: Any, prompts: list[str], most: int, batch: int) -> list[list[int]]:
    """New tokens of each prompt, without the end token."""
    import torch

    found = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        new = output[:, inputs["input_ids"].shape[1] :]
        tokenizer.batch_decode(new, skip_special_tokens=True)
        found += [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in new.tolist()]
    return found


def smallest_gap(model: Any, ids: list[int], first: list[int], second: list[int]) -> float:
    """How far apart the two likeliest logits are where two answers part."""
    import torch

    place = next((index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), min(len(first), len(second)))
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids, *first[:place]]])).logits[0, -1].float()
    best = logits.topk(2).values
    return float(best[0] - best[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--model", help="a model folder; the default is a random Llama of 26 M parameters")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.model or str(make_model(Path(name) / "model", options.shared.resolve()))
        measure(folder, options)


def measure(folder: str, options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from ftcli.exporting.open_target import open_target
    from ftcli.models.generate import generate, prompt_ids

    loaded = open_target(folder, device="cpu")
    plain = AutoTokenizer.from_pretrained(folder, padding_side="left")
    plain.pad_token = plain.pad_token or plain.eos_token
    lines = (options.shared / "data" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[: options.rows]
    prompts = [json.loads(line)["messages"][0]["content"] + "\nAnswer:" for line in lines]
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    mine: list[list[int]] = []
    other: list[list[int]] = []
    for _ in range(options.rounds):
        began = now()
        found = generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=options.new, batch_size=options.batch)
        mine = [list(one.tokens) for one in found]
        ours.append(since(began))
        began = now()
        other = by_transformers(loaded.model, plain, prompts, options.new, options.batch)
        theirs.append(since(began))
    num_tokens = sum(map(len, mine))
    apart = [place for place, (first, second) in enumerate(zip(mine, other, strict=True)) if first != second]
    gaps = [smallest_gap(loaded.model, prompt_ids(loaded.tokenizer, prompts[place]), mine[place], other[place]) for place in apart]
    print(
        "| rows | new tokens | clock | ftcli tokens/s | transformers tokens/s | times faster | rows equal | largest gap where they part |"
    )
    print("|--:|--:|---|--:|--:|--:|--:|--:|")
    for clock, name in enumerate(("wall", "processor")):
        mine_seconds, other_seconds = ([one[clock] for one in side] for side in (ours, theirs))
        ratios = [second / first for first, second in zip(mine_seconds, other_seconds, strict=True)]
        rates = [num_tokens / statistics.median(seconds) for seconds in (mine_seconds, other_seconds)]
        print(
            f"| {len(prompts)} | {num_tokens} | {name} | {rates[0]:.0f} | {rates[1]:.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | {len(prompts) - len(apart)} | {max(gaps, default=0.0):.1e} |"
        )


def now() -> tuple[float, float]:
    """Wall time and processor time, in seconds."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - began[0], time.process_time() - began[1]


if __name__ == "__main__":
    main()
