"""Tiny random models of several architectures, and what the tests of soft prompts do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.tiny_chat_model import write_tiny_chat_model

from ftcli.data.tree import SPAN, TokenTree, path_tree
from ftcli.layout.build import build_batch
from ftcli.layout.model import TreeModel
from ftcli.methods.context import AttachContext
from ftcli.models.load import load_model, save_weights
from ftcli.models.settings import Init, Model
from ftcli.models.tokenizer import Tokenizer, load_tokenizer

VOCABULARY = 258
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
# Windows shorter than a prompt with its example: what is counted wrongly shows.
SIZES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 96, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen3": {**LLAMA, "head_dim": 16},
    "mistral": {**LLAMA, "sliding_window": 12},
    "gemma2": {**LLAMA, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 12},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "deepseek_v3": {
        **LLAMA,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
}
IDS = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))


def write_bases(folder: Path, *names: str) -> dict[str, Model]:
    """Random models whose answers are far from uniform, each in a folder of its own."""
    found = {}
    for name in names:
        special = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.3}
        save_weights(load_model(Model(init=Init(architecture=name, config={**special, **SIZES[name]})), None, seed=3), folder / name)
        found[name] = Model(base=str(folder / name))
    return found


def byte_tokenizer(folder: Path) -> Tokenizer:
    """One token a byte, without a beginning token."""
    write_tiny_chat_model(folder)
    return load_tokenizer(str(folder))


def context(tokenizer: Tokenizer, seed: int = 5) -> AttachContext:
    def batches(count: int) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": IDS + 0 * index, "attention_mask": torch.ones_like(IDS)} for index in range(count)]

    return AttachContext(seed=seed, sample_batches=batches, tokenizer=tokenizer, answers=lambda count: [[5, 6], [7]])


def tree(length: int, seed: int = 0) -> TokenTree:
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, length)
    return path_tree(tokens.astype(np.int32), np.zeros(0, dtype=SPAN), 0, 0)


def log_probs(model: TreeModel, trees: list[TokenTree]) -> torch.Tensor:
    """Of every token but the first of each tree, in the model's layout."""
    weights = [(np.arange(len(one)) > 0).astype(np.float32) for one in trees]
    found: torch.Tensor = model(build_batch(model.layout, trees, weights))
    return found


@torch.no_grad()
def next_token(model: TreeModel, ids: list[int]) -> int:
    """The likeliest token after `ids`, teacher-forced."""
    one = path_tree(np.array(ids, dtype=np.int32), np.zeros(0, dtype=SPAN), 0, 0)
    hidden = model.hidden_states(build_batch("rows", [one], [np.zeros(len(ids), dtype=np.float32)]))
    return int(model.module.get_base_model().get_output_embeddings()(hidden[-1]).argmax())  # type: ignore[operator, union-attr]


def train_some(method: Any, model: TreeModel, trees: list[TokenTree], steps: int = 2) -> list[float]:
    optimizer = torch.optim.SGD(method.parameter_groups(model.module, 0.1, 0.0))
    losses = []
    for _ in range(steps):
        loss = -log_probs(model, trees).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
