"""Positions are scaled as the configuration says, from the context of the base, and never twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ftcli.errors import RequestError
from ftcli.models.fingerprint import note_base
from ftcli.models.load import load_config, load_model
from ftcli.models.rope import RopeDynamic, RopeLinear, RopeLlama3, RopeScaling, RopeYarn
from ftcli.models.settings import Model, noted_rope_settings

LLAMA: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def config(kind: str = "llama", **fields: Any) -> Any:
    return CONFIG_MAPPING[kind](**{**LLAMA, "max_position_embeddings": 64, **fields})


@pytest.mark.parametrize("rope", [RopeLinear(factor=4), RopeYarn(factor=4), RopeLlama3(factor=4)])
def test_the_model_turns_its_positions_as_transformers_does_for_this_configuration(rope: RopeScaling, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_config(config())
    plain.save_pretrained(tmp_path / "base")
    scaled = load_model(Model(base=str(tmp_path / "base"), rope=rope), None)
    assert scaled.config.max_position_embeddings == 256
    assert scaled.model.rotary_emb.rope_type == rope.kind  # type: ignore[attr-defined,union-attr]
    assert not torch.equal(scaled.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)  # type: ignore[union-attr,arg-type]
    scaled.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, scaled(ids).logits)
    assert not torch.allclose(plain(ids).logits, scaled(ids).logits)


def test_linear_scaling_divides_every_frequency() -> None:
    found = config()
    RopeLinear(factor=4).apply(found)
    scaled, plain = (AutoModelForCausalLM.from_config(each).model.rotary_emb.inv_freq for each in (found, config()))
    assert torch.allclose(scaled * 4, plain)


def test_dynamic_scaling_leaves_the_context_of_training() -> None:
    found = config()
    RopeDynamic(factor=2).apply(found)
    assert (found.max_position_embeddings, found.rope_parameters["rope_type"]) == (64, "dynamic")


def test_layers_with_a_window_keep_their_positions() -> None:
    found = config("gemma3_text", head_dim=16, sliding_window=8)
    before = dict(found.rope_parameters["sliding_attention"])
    RopeYarn(factor=2).apply(found)
    assert found.rope_parameters["sliding_attention"] == before
    assert found.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert found.rope_parameters["full_attention"]["rope_theta"] == 1000000.0


def test_a_scaled_base_is_scaled_from_its_original_context() -> None:
    found = config()
    RopeLlama3(factor=2).apply(found)
    RopeYarn(factor=8).apply(found)
    assert found.max_position_embeddings == 512
    with pytest.raises(RequestError, match="is 256, and the base reads 512"):
        RopeYarn(factor=4).apply(found)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (CONFIG_MAPPING["gpt2"](), "a `gpt2` has no rotary positions"),
        (config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "does not say from how many tokens"),
    ],
)
def test_a_base_that_cannot_be_scaled_is_refused_with_the_reason(found: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        RopeYarn(factor=4).apply(found)


def test_parameters_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="must be smaller"):
        RopeYarn(factor=2, beta_fast=1, beta_slow=2)
    with pytest.raises(ValueError, match="must be smaller"):
        RopeLlama3(factor=2, low_freq_factor=4)


def test_an_adapter_folder_says_how_its_base_was_scaled(tmp_path: Path) -> None:
    assert noted_rope_settings(tmp_path) is None
    rope = RopeYarn(factor=2)
    note_base(tmp_path, "a", "b", rope.model_dump())
    assert noted_rope_settings(tmp_path) == rope
    note_base(tmp_path, "a", "b", {"kind": "spiral"})
    with pytest.raises(RequestError, match="not understood"):
        noted_rope_settings(tmp_path)


def test_the_configuration_alone_is_scaled_too() -> None:
    assert load_config(Model(base="builtin:tiny", rope=RopeYarn(factor=2))).max_position_embeddings == 2048
