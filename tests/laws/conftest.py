"""Tiny models and ragged trees for the laws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from ftcli.data.tree import SPAN, TokenTree, path_tree

VOCABULARY = 97


def make_llama(**changes: object) -> nn.Module:
    """Two layers of 32, grouped heads, float64 so that only real differences show."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **changes})).double()


def make_tree(generator: np.random.Generator, length: int, first_target: int, weight: float = 1.0) -> TokenTree:
    """A path of random tokens whose tail is trained."""
    spans = np.array([(first_target, length, weight, False)], dtype=SPAN)
    return path_tree(generator.integers(0, VOCABULARY, length).astype(np.int32), spans, num_bytes=length - first_target, row=0)


def ragged_trees(count: int = 9) -> list[TokenTree]:
    """Paths of very different lengths, numbers of targets and weights: what a mean of means gets wrong."""
    generator = np.random.default_rng(3)
    lengths = generator.integers(2, 40, count)
    firsts = [int(generator.integers(1, length)) for length in lengths]
    return [
        make_tree(generator, int(n), first, weight) for n, first, weight in zip(lengths, firsts, [1.0, 0.25, 2.0] * count, strict=False)
    ]


def branching_tree() -> TokenTree:
    """A prompt with two answers, one of which branches again."""
    generator = np.random.default_rng(5)
    spans = np.array(
        [(3, 7, 0.5, False), (7, 12, 1.0, False), (12, 15, 2.0, False), (15, 20, 1.0, False), (20, 26, 1.0, False)], dtype=SPAN
    )
    starts = np.array([0, 7, 12, 15, 20], dtype=np.int32)
    parents = np.array([-1, 0, 0, 2, 2], dtype=np.int32)
    return TokenTree(generator.integers(0, VOCABULARY, 26).astype(np.int32), starts, parents, spans, 19, 0)


@pytest.fixture
def llama() -> Callable[..., nn.Module]:
    return make_llama
