"""A model folder for tests that talk: random weights, one token a byte, a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONTEXT = 64
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def write_tiny_chat_model(path: Path, template: str | None = TEMPLATE) -> None:
    """Write a Llama of 2 layers x 32 whose answers are bytes without sense, the same ones every time."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    # far from uniform, so that the order of summation does not decide which token is likeliest
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=CONTEXT, initializer_range=0.4, **sizes))
    model.save_pretrained(path)
