"""Whether what is planned fits the configuration that is written: told from headers and JSON, before any tensor is read.

A merged model has one configuration. Tensors of other shapes than it says, layers of another architecture, and layers that were trained
with other positions or heads than it can say are refused; what it says a little differently is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ftcli.errors import RequestError
from ftcli.merging.configuration import differences, says_of_layers
from ftcli.merging.documents import read_object
from ftcli.merging.layers import embedding_name, is_buffer, is_embedding, is_head, num_layers, text_config
from ftcli.merging.planned import TensorPlan
from ftcli.merging.settings import Wrong
from ftcli.merging.sources import Source
from ftcli.models.layer_lists import LayerOrigin

Warn = Callable[[str], None]
Shape = tuple[int | None, ...]
"""None is a size that a configuration does not say."""

_LISTED = 3
_NUMBER = re.compile(r"(^|\.)\d+\.")
_REST = re.compile(r"(?:^|\.)(?:layers|h)\.\d+\.(.+)$")
_SIDE_TOWER = re.compile(r"vision|visual|audio|image|encoder")
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2")
"""Types of models whose layers have Llama's names and shapes."""
_EVEN_HEADS = ("llama", "mistral", "qwen2", "olmo2")
"""Of these, those whose heads share the hidden size evenly where the configuration says no `head_dim`."""


def compare_sources(sources: Sequence[Source], donor: int, warn: Warn) -> None:
    """Warn where two models mean something else by the same weights, where an adapter may be on another base than its own, and of
    heads that are not the embedding any more."""
    first = sources[donor]
    for source in sources:
        if source is not first and (found := differences(text_config(first.config), text_config(source.config))):
            warn(f"`{first.reference}` and `{source.reference}` are configured differently: {'; '.join(found[:4])}")
        if source.doubt is not None:
            warn(f"`{source.reference}`: {source.doubt}")
        if source.adapter is not None and (tie := source.adapter.own_head) is not None:
            what = f"the adapter parts `{tie.head}` and `{tie.embedding}`, which are one tensor in its base"
            warn(f"`{source.reference}`: {what}; the head is written apart")


def check_layers(origins: Sequence[LayerOrigin], sources: Sequence[Source], donor: int, wrong: Wrong, warn: Warn) -> None:
    """Layers of several models must be such that one configuration can say what they compute."""
    mine = text_config(sources[donor].config)
    names = {id(text_config(source.config)): source.reference for source in sources}
    others = {id(config): config for config, _ in origins if config is not mine}
    for key, other in others.items():
        who, whose = names[key], sources[donor].reference
        if mine.get("model_type") != other.get("model_type"):
            kinds = f"a {other.get('model_type')}'s, and the configuration that is written (`{whose}`'s) is a {mine.get('model_type')}'s"
            wrong(who, f"its layers are {kinds}", "layers can be put together from models of one architecture")
            continue
        refused, doubtful = says_of_layers(mine, other)
        if refused:
            what = f"its layers cannot be said by the configuration that is written, `{whose}`'s: {'; '.join(refused)}"
            wrong(who, what, "a configuration has one value for all layers: take layers of models that agree in it")
        if doubtful:
            warn(f"the layers of `{who}` will compute with `{whose}`'s configuration: {'; '.join(doubtful)}")


def check_shapes(
    tensors: Sequence[TensorPlan], sources: Sequence[Source], donor: int, config: Mapping[str, Any], wrong: Wrong, *, same_rows: bool
) -> None:
    """Every tensor must have the shape that the written configuration gives it.

    Args:
        config: that configuration.
        same_rows: False where the merged vocabulary is another than the models'.
    """
    source = sources[donor]
    known = _shapes_by_kind(source)
    sizes_differ = _has_sizes_by_layer(text_config(source.config))
    strangers: dict[int, list[str]] = {}
    misfits: dict[int, list[str]] = {}
    for tensor in tensors:
        if is_buffer(tensor.name):
            continue
        origin = tensor.inputs[0].source
        allowed = known.get(_kind(tensor.name)) or (_embedding_shapes(source) if is_head(tensor.name) else None)
        by_rows = same_rows or not (is_embedding(tensor.name) or is_head(tensor.name))
        if allowed is None:
            strangers.setdefault(origin, []).append(f"`{tensor.name}`")
        elif not sizes_differ and not any(shape == tensor.shape if by_rows else shape[1:] == tensor.shape[1:] for shape in allowed):
            expected = " or ".join(sorted(str(list(shape)) for shape in allowed))
            misfits.setdefault(origin, []).append(f"`{tensor.name}` is {list(tensor.shape)}, `{source.reference}` has {expected}")
    hint = f"the configuration that is written is `{source.reference}`'s"
    for origin, names in strangers.items():
        wrong(sources[origin].reference, f"has tensors that `{source.reference}` has in no layer: {_few(names)}", hint)
    for origin, found in misfits.items():
        wrong(sources[origin].reference, f"has other shapes: {_few(found)}", hint)
    if not strangers and not misfits and (said := list(_against_configuration(tensors, config))):
        what = f"the configuration of `{source.reference}` says other shapes: {_few(said)}"
        wrong("config.json", what, "its weights do not belong to its config.json")


def _few(words: Sequence[str]) -> str:
    return ", ".join(words[:_LISTED]) + (f" ... and {len(words) - _LISTED} more" if len(words) > _LISTED else "")


def _kind(name: str) -> str:
    """The name of a tensor without the number of its layer.

    Example:
        >>> _kind("model.layers.12.mlp.experts.3.up_proj.weight")
        'model.layers.*.mlp.experts.3.up_proj.weight'
    """
    return _NUMBER.sub(r"\1*.", name, count=1)


def _shapes_by_kind(source: Source) -> dict[str, set[tuple[int, ...]]]:
    found: dict[str, set[tuple[int, ...]]] = {}
    for name in source.tensors:
        found.setdefault(_kind(name), set()).add(source.tensor(name).shape)
    return found


def _embedding_shapes(source: Source) -> set[tuple[int, ...]] | None:
    """A tied head is stored as the embedding."""
    name = embedding_name(source)
    return None if name is None else {source.tensor(name).shape}


def _has_sizes_by_layer(config: Mapping[str, Any]) -> bool:
    """True where a configuration lists sizes or heads for each layer: they follow their layers."""
    count = num_layers(config)
    return any(
        isinstance(value, list) and len(value) == count and re.search(r"size|head|ffn|multiplier", key) for key, value in config.items()
    )


def _against_configuration(tensors: Sequence[TensorPlan], config: Mapping[str, Any]) -> Iterator[str]:
    inner = text_config(config)
    expected = expected_shapes(inner)
    for tensor in tensors:
        if _SIDE_TOWER.search(tensor.name):
            continue
        match = _REST.search(tensor.name)
        key = match[1] if match is not None else "embedding" if is_embedding(tensor.name) or is_head(tensor.name) else tensor.name
        shape = expected.get(key)
        if shape is None or tensor.name.endswith("lm_head.bias"):
            continue
        if len(shape) != len(tensor.shape) or any(said not in (None, size) for said, size in zip(shape, tensor.shape, strict=True)):
            expected_sizes = ", ".join("?" if size is None else str(size) for size in shape)
            yield f"`{tensor.name}` is {list(tensor.shape)}, expected [{expected_sizes}]"


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The shapes that a (text) configuration gives the tensors of a layer, and `embedding`; empty for types of models not known here.

    Example:
        >>> sizes = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 40}
        >>> found = expected_shapes(sizes)
        >>> found["self_attn.q_proj.weight"], found["mlp.down_proj.weight"], found["embedding"]
        ((8, 8), (8, 12), (40, 8))
    """
    kind = config.get("model_type")
    if kind == "gpt2":
        return _gpt2_shapes(config)
    if kind not in _LLAMA_LIKE:
        return {}
    hidden, inner, heads = (_size(config, key) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = _size(config, "head_dim")
    if head is None and kind in _EVEN_HEADS and hidden is not None and heads:
        head = hidden // heads
    key_heads = _size(config, "num_key_value_heads") or (heads if kind == "llama" else None)
    query = None if heads is None or head is None else heads * head
    key = None if key_heads is None or head is None else key_heads * head
    shapes: dict[str, Shape] = {"embedding": (_size(config, "vocab_size"), hidden)}
    attention = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    feed_forward = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes |= {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    shapes |= {f"mlp.{name}.weight": shape for name, shape in feed_forward.items()}
    return shapes | {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}


def _gpt2_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    hidden = _size(config, "n_embd")
    inner = _size(config, "n_inner") or (None if hidden is None else 4 * hidden)
    triple = None if hidden is None else 3 * hidden
    return {
        "embedding": (_size(config, "vocab_size"), hidden),
        "attn.c_attn.weight": (hidden, triple),
        "attn.c_proj.weight": (hidden, hidden),
        "mlp.c_fc.weight": (hidden, inner),
        "mlp.c_proj.weight": (inner, hidden),
        **{f"{name}.weight": (hidden,) for name in ("ln_1", "ln_2")},
    }


def _size(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def check_documents(source: Source, wrong: Wrong) -> None:
    """The donor's small files must be readable: they are copied or changed when the weights are written."""
    for folder, name in ((source.folder, "generation_config.json"), (source.tokenizer_folder, "tokenizer_config.json")):
        if (folder / name).is_file():
            try:
                read_object(folder / name)
            except RequestError as error:
                wrong(source.reference, error.problems[0].what, error.problems[0].hint)


def check_settings(tensors: Sequence[TensorPlan], wrong: Wrong) -> None:
    """What single tensors cannot know of their settings: they must agree where all tensors are looked at together."""
    densities: dict[str, set[float]] = {}
    for tensor in tensors:
        if tensor.settings.get("scope") == "global":
            for label, density in zip(tensor.labels, tensor.settings["density"], strict=True):
                densities.setdefault(label, set()).add(density)
    for label, found in densities.items():
        if len(found) > 1:
            listed = ", ".join(f"{density:g}" for density in sorted(found)[:4])
            wrong(label, f"`scope: global` trims all tensors together, and its density is {listed}", "one density for each model")
    scales = [tensor.settings.get("scale") for tensor in tensors]
    if scales and all(scale is not None and not any(scale) for scale in scales):
        wrong("parameters.scale", "every tensor is scaled by 0: the merged model would be zeros", None)
