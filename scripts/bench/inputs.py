"""What both sides of the comparison are given: a model folder, the same chats in the same order, and one set of numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[3] / "shared"
LORA_ALPHA_OVER_RANK = 2


@dataclass(frozen=True)
class Setting:
    """Everything that a measured run depends on; the workers read it as JSON."""

    method: str
    """lora, full or qlora."""
    steps: int
    warm_up_steps: int
    """First steps, which are trained but not timed."""
    threads: int
    lr: float
    rank: int = 16
    batch_size: int = 8
    max_length: int = 1024
    max_grad_norm: float = 1.0
    seed: int = 17

    def write(self, folder: Path) -> Path:
        path = folder / f"setting-{self.method}.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @staticmethod
    def read(path: Path) -> Setting:
        return Setting(**json.loads(path.read_text(encoding="utf-8")))


LLAMA: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""25.6 million weights, 12.6 million of them in the embedding that is also the head."""


def make_model(folder: Path, tokenizer: Path, seed: int = 17) -> Path:
    """A Llama with random weights and the tokenizer at `tokenizer`, as an ordinary model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model_folder = folder / "model"
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(model_folder)
    for path in tokenizer.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, model_folder / path.name)
    return model_folder


def write_chats(folder: Path, source: Path, setting: Setting) -> None:
    """``chats.jsonl`` for ftcli, and ``prompts.jsonl`` in the order in which ftcli will see them: prompt and completion, for TRL."""
    from ftcli.data.mixtures.passes import Passes
    from ftcli.data.order import Order

    count = setting.steps * setting.batch_size
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for _, line in zip(range(count), lines, strict=False)]
    if len(rows) < count:
        raise SystemExit(f"{source} has {len(rows)} rows, {count} are needed: fewer --steps")
    order = Order([count], [1.0], [1.0], Passes(), global_batch_size=setting.batch_size, steps=setting.steps, seed=setting.seed)
    indices = [index for step in range(1, setting.steps + 1) for _, index in order.examples_at(step)]
    _write(folder / "chats.jsonl", [{"messages": row} for row in rows])
    _write(folder / "prompts.jsonl", [{"prompt": rows[i][:-1], "completion": rows[i][-1:]} for i in indices])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
