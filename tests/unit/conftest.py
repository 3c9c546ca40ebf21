"""A byte-level tokenizer small enough to make in every test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ftcli.models.tokenizer import Tokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with tokenizer files: one token a byte, and the given special tokens."""

    def make(*, template: str | None = None, tokens: tuple[str, ...] = (), bos: bool = False, **config: Any) -> Path:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Backend(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", *tokens)])
        if bos:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | config
        settings = {key: value for key, value in settings.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def make_tokenizer(tokenizer_folder: Callable[..., Path]) -> Callable[..., Tokenizer]:
    """Makes a tokenizer with the given chat template and special tokens."""

    def make(template: str | None = CHATML, **given: Any) -> Tokenizer:
        given.setdefault("tokens", ("<|im_start|>", "<|im_end|>"))
        return load_tokenizer(str(tokenizer_folder(template=template, **given)))

    return make


@pytest.fixture
def base(make_tokenizer: Callable[..., Tokenizer], tmp_path: Path) -> Path:
    """A folder with a tiny Llama that talks ChatML."""
    from ftcli.models.load import load_model, save_model
    from ftcli.models.settings import Init, Model

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.2}
    tokenizer, folder = make_tokenizer(), tmp_path / "base"
    save_model(load_model(Model(init=Init(architecture="llama", config=sizes)), tokenizer, seed=1), tokenizer, folder)
    return folder


@pytest.fixture
def make_adapter(base: Path) -> Callable[..., Path]:
    """Makes an adapter on the base with factors that change every answer."""

    def make(name: str, *, on: Path | None = None, **settings: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(on or base)
        module = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}))
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        module.peft_config["default"].base_model_name_or_path = str(on or base)
        folder = base.parent / name
        module.save_pretrained(folder)
        return folder

    return make
