"""Settings under which the same weights mean something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIZES = ("hidden_size", "n_embd", "intermediate_size", "n_inner")
_LAYERS = (
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "activation_function"),
    *("sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar", "partial_rotary_factor"),
)
"""What layers compute: a configuration has one value for all of them."""
_SMALL = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
"""What changes the numbers a little."""
_COMPARED = ("model_type", *_LAYERS, "rope_theta", "rope_scaling", "rope_parameters", *_SMALL, "tie_word_embeddings")


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Settings under which the same weights mean something else, where two configurations differ in them."""
    return _differing(first, second, _COMPARED)


def _differing(first: Mapping[str, Any], second: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    return [
        f"{key} is {first.get(key)} and {second.get(key)}" for key in keys if key in first and key in second and first[key] != second[key]
    ]


def says_of_layers(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Where the first configuration cannot say what the second's layers compute, and where it says it a little differently."""
    # lists have an entry for each layer, which follows it
    keys = tuple(key for key in (*_SIZES, *_LAYERS) if not isinstance(first.get(key), list) and not isinstance(second.get(key), list))
    if first.get("use_sliding_window") is False and second.get("use_sliding_window") is False:
        keys = tuple(key for key in keys if key != "sliding_window")
    refused = _differing(first, second, keys)
    (theta, rest), (other_theta, other_rest) = _positions(first), _positions(second)
    if None not in (theta, other_theta) and theta != other_theta:
        refused.append(f"rope_theta is {theta} and {other_theta}")
    doubtful = _differing(first, second, _SMALL)
    if _is_by_kind(rest) != _is_by_kind(other_rest):
        doubtful.append("positions are said for all layers together in one, for each kind of layer in the other")
    elif rest != other_rest:
        refused.append(f"the scaling of positions is {rest or 'none'} and {other_rest or 'none'}")
    return refused, doubtful


def _is_by_kind(positions: Mapping[str, Any]) -> bool:
    """True of settings that each kind of layer has its own of."""
    return any(isinstance(value, dict) for value in positions.values())


def _positions(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The base of rotary positions, and how they are scaled, wherever a configuration says it."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        found |= value if isinstance(value, dict) else {}
    theta = config.get("rope_theta", found.pop("rope_theta", None))
    found.pop("rope_theta", None)
    kind = found.pop("rope_type", found.pop("type", "default"))
    for key in ("type", "partial_rotary_factor"):  # the latter may stand beside them, too
        found.pop(key, None)
    return theta, found | ({} if kind == "default" else {"rope_type": kind})
