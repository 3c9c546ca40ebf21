"""Which of a model's tensors belong to which layer, told from their names and the configuration's number of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcli.errors import Problem
from ftcli.models.layer_lists import NUM_LAYERS_KEYS

if TYPE_CHECKING:
    from ftcli.merging.sources import Source

_LAYER = re.compile(r"^(.*?)\.?(\d+)\.(.+)$")
_SIDE_TOWER = re.compile(r"vision|visual|audio|image|encoder")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_BEFORE_LAYERS = re.compile(r"(^|[._])(embed|embeddings?|wte|wpe|embed_in|embed_positions|tok_embeddings)([._]|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.(weight|bias)$")
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|attn\.bias|attention\.bias|position_ids)$")


@dataclass(frozen=True)
class LayerMap:
    """A model's tensors, by layer."""

    prefix: str
    """Of the names of layers: ``model.layers``."""
    num_layers: int
    by_layer: Mapping[int, tuple[str, ...]]
    """For each layer, the rest of the names of its tensors."""
    outside: tuple[str, ...]
    """Tensors that are in no layer."""

    def name(self, layer: int, rest: str) -> str:
        return f"{self.prefix}.{layer}.{rest}" if self.prefix else f"{layer}.{rest}"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that tells of the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def num_layers(config: Mapping[str, Any]) -> int | None:
    """The number of layers that a configuration says."""
    inner = text_config(config)
    return next((inner[key] for key in NUM_LAYERS_KEYS if isinstance(inner.get(key), int)), None)


def layer_map(source: Source, module: str | None, other_modules: Iterable[str] = ()) -> LayerMap | Problem:
    """The layers of a source, or why they cannot be told.

    Args:
        module: tensors with this among the parts of their names; None is all but those of `other_modules`.
    """
    others = set(other_modules)
    names = [name for name in source.tensors if _belongs(name, module, others)]
    wanted = num_layers(source.config) if module is None else None
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        if (match := _LAYER.match(name)) is not None:
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append(match[3])
    complete = [
        prefix
        for prefix, layers in found.items()
        if (set(range(wanted)) <= set(layers) if wanted is not None else set(range(len(layers))) == set(layers))
    ]
    complete.sort(key=lambda prefix: (module is None and bool(_SIDE_TOWER.search(prefix)), -sum(map(len, found[prefix].values()))))
    if not complete:
        if module is not None:
            return LayerMap("", 0, {}, tuple(names))
        said = "no number of layers" if wanted is None else f"{wanted} layers"
        has = ", ".join(f"`{prefix}` 0 to {max(layers)}" for prefix, layers in list(found.items())[:4]) or "no numbered tensors"
        return Problem(source.reference, f"its configuration says {said}, its tensors: {has}", None)
    prefix = complete[0]
    count = wanted if wanted is not None else len(found[prefix])
    inside = {layer: tuple(rests) for layer, rests in found[prefix].items() if layer < count}
    taken = {f"{prefix}.{layer}.{rest}" if prefix else f"{layer}.{rest}" for layer, rests in inside.items() for rest in rests}
    return LayerMap(prefix, count, inside, tuple(name for name in names if name not in taken))


def _belongs(name: str, module: str | None, others: set[str]) -> bool:
    parts = set(name.split("."))
    return module in parts if module is not None else not parts & others


def is_embedding(name: str) -> bool:
    """True for the embedding of the tokens."""
    return _EMBEDDING.search(name) is not None


def is_head(name: str) -> bool:
    """True for the output head."""
    return _HEAD.search(name) is not None


def is_before_layers(name: str) -> bool:
    """True for embeddings and what belongs to them; what else is outside the layers comes behind them."""
    return _BEFORE_LAYERS.search(name) is not None and not is_head(name)


def is_buffer(name: str) -> bool:
    """True for tensors that old checkpoints hold and that models compute by themselves."""
    return _BUFFERS.search(name) is not None


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """What a configuration says of the head: the embedding itself, its own weights, or nothing."""
    for part in (text_config(config), config):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def embedding_name(source: Source) -> str | None:
    """The name of the token embedding of a model."""
    names = [name for name in source.tensors if is_embedding(name) and not _SIDE_TOWER.search(name)]
    return names[0] if names else None
