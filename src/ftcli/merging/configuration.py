"""Settings under which the same weights mean something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COMPARED = (
    *("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "rope_theta"),
    *("rope_scaling", "rope_parameters", "sliding_window", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "tie_word_embeddings"),
)


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Settings under which the same weights mean something else, where two configurations differ in them."""
    return [
        f"{key} is {first.get(key)} and {second.get(key)}"
        for key in _COMPARED
        if key in first and key in second and first[key] != second[key]
    ]
