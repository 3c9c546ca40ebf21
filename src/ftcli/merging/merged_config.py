"""The configuration of a merged model: one of its models', with what the merge has made of its layers, vocabulary, dtype and head."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from ftcli.merging.layers import is_embedding, is_head, is_tied, text_config
from ftcli.merging.methods.method import MergeMethod
from ftcli.merging.numbers import DTYPES
from ftcli.merging.planned import TensorPlan
from ftcli.merging.recipe import MergeRecipe
from ftcli.merging.settings import Wrong
from ftcli.merging.sources import Source
from ftcli.merging.vocabulary import Vocabulary
from ftcli.models.layer_lists import LayerOrigin, merged_layers


def merged_configuration(
    sources: Sequence[Source],
    donor: int,
    tensors: Sequence[TensorPlan],
    origins: Sequence[LayerOrigin],
    vocabulary: Vocabulary | None,
    recipe: MergeRecipe,
    wrong: Wrong,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """The configuration that is written.

    Args:
        donor: the source whose configuration it starts from.
        origins: for each merged layer whose it is.
    """
    config = json.loads(json.dumps(sources[donor].config))
    inner, faults = merged_layers(text_config(sources[donor].config), list(origins))
    for fault in faults:
        wrong("config.json", fault, None)
    if "text_config" in config and isinstance(config["text_config"], dict):
        config["text_config"] = inner
    else:
        config = inner
    target = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    if vocabulary is not None:
        target["vocab_size"] = vocabulary.size
        vocabulary.special.renumber(target)
        if target is not config:
            vocabulary.special.renumber(config)
    if recipe.dtype is not None:
        name = next(word for word, stored in DTYPES.items() if stored == recipe.dtype)
        for part in (config, target):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = name
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = name
    _set_tie(recipe.method, sources, donor, tensors, config, target, warn)
    return dict(config)


def _set_tie(
    method: MergeMethod,
    sources: Sequence[Source],
    donor: int,
    tensors: Sequence[TensorPlan],
    config: dict[str, Any],
    target: dict[str, Any],
    warn: Callable[[str], None],
) -> None:
    """A head that is not made as the embedding is makes the merged model untied."""
    head = next((tensor for tensor in tensors if is_head(tensor.name) and tensor.name.endswith(".weight")), None)
    if head is None:
        return
    had_head = any(is_head(name) for name in sources[donor].tensors)
    is_alike = not method.is_random and any(_is_made_alike(sources, head, tensor) for tensor in tensors)
    if is_alike or (had_head and is_tied(config) is False):
        return
    # what a configuration that does not say it means differs between architectures
    is_silent = had_head and is_tied(config) is None
    for part in (config, target):
        part["tie_word_embeddings"] = False
    if is_silent:
        return
    warn("the merged model has a head of its own: not all models tie it to the embedding")


def _is_made_alike(sources: Sequence[Source], head: TensorPlan, embedding: TensorPlan) -> bool:
    """True of the embedding, where the head of every model is it or a stored copy of it, and both are merged in the same way."""
    if not is_embedding(embedding.name) or (head.settings, head.is_copy) != (embedding.settings, embedding.is_copy):
        return False
    if any(head.statistics) or any(embedding.statistics):
        return False
    inputs, others = ([*tensor.inputs, *([tensor.base] if tensor.base else [])] for tensor in (head, embedding))
    if [item.source for item in inputs] != [item.source for item in others]:
        return False
    return all(first == second or is_tied(sources[first.source].config) is True for first, second in zip(inputs, others, strict=True))
