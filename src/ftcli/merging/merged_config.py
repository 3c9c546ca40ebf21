"""The configuration of a merged model: one of its models', with what the merge has made of its layers, vocabulary, dtype and head."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ftcli.merging.layers import is_head, text_config
from ftcli.merging.numbers import DTYPES
from ftcli.merging.planned import TensorPlan
from ftcli.merging.settings import Wrong
from ftcli.merging.sources import Source
from ftcli.merging.vocabulary import Vocabulary
from ftcli.models.layer_lists import LayerOrigin, merged_layers


def merged_configuration(
    source: Source,
    tensors: Sequence[TensorPlan],
    origins: Sequence[LayerOrigin],
    vocabulary: Vocabulary | None,
    dtype: str | None,
    wrong: Wrong,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """The configuration that is written.

    Args:
        source: whose configuration it starts from.
        origins: for each merged layer whose it is.
        dtype: safetensors' name of what the recipe has written; None leaves it as it is.
    """
    config = json.loads(json.dumps(source.config))
    inner, faults = merged_layers(text_config(source.config), list(origins))
    for fault in faults:
        wrong("config.json", fault, None)
    if "text_config" in config and isinstance(config["text_config"], dict):
        config["text_config"] = inner
    else:
        config = inner
    target = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if vocabulary is not None:
        target["vocab_size"] = vocabulary.size
        vocabulary.renumber(target)
        if target is not config:
            vocabulary.renumber(config)
    if dtype is not None:
        name = next(word for word, stored in DTYPES.items() if stored == dtype)
        for part in (config, target):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = name
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = name
    _set_tie(source, tensors, config, target, warn)
    return dict(config)


def _set_tie(
    source: Source, tensors: Sequence[TensorPlan], config: dict[str, Any], target: dict[str, Any], warn: Callable[[str], None]
) -> None:
    """A head that only some models have of their own makes the merged model untied."""
    has_head = any(is_head(tensor.name) for tensor in tensors)
    had_head = any(is_head(name) for name in source.tensors)
    if has_head and not had_head:
        for part in (config, target):
            part["tie_word_embeddings"] = False
        warn("the merged model has a head of its own: not all models tie it to the embedding")
