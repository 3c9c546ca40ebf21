"""A grown base computes what it did, is an ordinary model of its class, and its configuration follows its layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ftcli.errors import RecipeError, RequestError
from ftcli.methods.context import AttachContext
from ftcli.methods.freeze import Freeze
from ftcli.models.changes import changes_of, probe_logits
from ftcli.models.grow.blocks import GrowBlocks, interleaved
from ftcli.models.grow.depth import GrowDepth
from ftcli.models.grow.experts import GrowExperts
from ftcli.models.grow.growth import grow, grown_parameters, rebuilt
from ftcli.models.grow.width import GrowWidth
from ftcli.recipe.load import load_recipe

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA_LIKE = {**SMALL, "intermediate_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "qwen3": {**LLAMA_LIKE, "head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "gemma3_text": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 4},
    "qwen3_moe": {
        **LLAMA_LIKE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "mlp_only_layers": [1],
    },
}
# One product of stacked gates and values is cut otherwise when it is wider, which rounds.
ROUNDED = {"mixtral", "qwen3_moe"}


def make(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**CONFIGS[kind], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # far from their first values, so that biases and norms matter
            parameter.add_(torch.randn_like(parameter) * 0.1) if parameter.ndim == 1 else parameter.mul_(4)
    return model


def reloaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_leave_logits_unchanged_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    before = probe_logits(model, 97)
    grown = grow(model, GrowBlocks(num_blocks=2), 1)
    assert grown.config.num_hidden_layers == 6
    assert torch.equal(probe_logits(grown, 97), before)
    assert torch.equal(probe_logits(reloaded(grown, tmp_path), 97), before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_silent_neurons_leave_logits_unchanged(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    before = probe_logits(model, 97)
    grown = grow(model, GrowWidth(factor=1.5), 1)
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in make(kind).parameters())
    difference = float((probe_logits(grown, 97) - before).abs().max())
    assert difference == 0.0 or (kind in ROUNDED and difference < 2e-6)
    assert torch.equal(probe_logits(reloaded(grown, tmp_path), 97), probe_logits(grown, 97))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("is_old", [True, False], ids=["an old neuron", "a new one"])
def test_silent_neurons_are_proven_by_their_weights(kind: str, is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(model: Any, config: Any, tensors: dict[str, Any]) -> Any:
        made = rebuilt(model, config, tensors)
        name = next(n for n in tensors if n.endswith(("mlp.down_proj.weight", "mlp.c_proj.weight", "experts.down_proj")))
        neurons = made.get_parameter(name) if kind != "gpt2" else made.get_parameter(name).T
        with torch.no_grad():
            neurons[..., 0 if is_old else -1] += 1e-9  # far less than logits show
        return made

    monkeypatch.setattr("ftcli.models.grow.width.rebuilt", altered)
    with pytest.raises(RequestError, match="old neurons would not be what they were"):
        grow(make(kind), GrowWidth(factor=1.5), 1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_neurons_that_share_compute_the_same_up_to_rounding(kind: str) -> None:
    model = make(kind)
    before = probe_logits(model, 97)
    grown = grow(model, GrowWidth(factor=2.5, start="split"), 1)
    assert torch.allclose(probe_logits(grown, 97), before, atol=5e-6)
    assert not any(bool((tensor == 0).all(dim=0).any()) for name, tensor in grown.named_parameters() if name.endswith("down_proj.weight"))


@pytest.mark.parametrize(("kind", "sibling"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
def test_experts_compute_what_the_dense_network_did(kind: str, sibling: str, tmp_path: Path) -> None:
    model = make(kind, **({"use_sliding_window": False} if kind == "qwen3" else {}))
    before = probe_logits(model, 97)
    grown = grow(model, GrowExperts(num_experts=3, experts_per_token=2), 1)
    assert grown.config.model_type == sibling
    assert torch.allclose(probe_logits(grown, 97), before, atol=5e-6)
    assert torch.equal(probe_logits(reloaded(grown, tmp_path), 97), probe_logits(grown, 97))


def test_depth_stacks_two_copies_without_the_layers_at_the_seam(tmp_path: Path) -> None:
    model = make("gemma3_text")
    layers = [layer.mlp.up_proj.weight.detach().clone() for layer in model.model.layers]
    grown = grow(model, GrowDepth(left_out=1), 1)
    found = [layer.mlp.up_proj.weight for layer in grown.model.layers]
    assert [next(index for index, old in enumerate(layers) if torch.equal(new, old)) for new in found] == [0, 1, 2, 1, 2, 3]
    assert found[1].data_ptr() != found[3].data_ptr()
    assert torch.equal(probe_logits(reloaded(grown, tmp_path), 97), probe_logits(grown, 97))
    assert "logits change" in changes_of(grown)[0].detail


def test_lists_of_the_configuration_follow_the_layers() -> None:
    assert grow(make("qwen3"), GrowBlocks(num_blocks=2), 1).config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    window = "sliding_attention"
    assert grow(make("gemma3_text"), GrowDepth(), 1).config.layer_types == [window, "full_attention"] * 3
    assert grow(make("qwen3_moe"), GrowBlocks(num_blocks=4), 1).config.mlp_only_layers == [2, 3]


def test_only_new_blocks_train_when_asked() -> None:
    grown = grow(make("llama"), GrowBlocks(num_blocks=2), 1)
    Freeze(grown=True).attach(grown, AttachContext(seed=1))
    trained = {name for name, parameter in grown.named_parameters() if parameter.requires_grad}
    assert trained == grown_parameters(grown)
    assert {name.split(".")[2] for name in trained} == {"2", "5"}


def test_all_that_is_silent_in_a_new_block_gets_a_gradient() -> None:
    grown = grow(make("llama"), GrowBlocks(num_blocks=1), 1)
    grown(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    block = grown.model.layers[4]
    assert float(block.self_attn.o_proj.weight.grad.abs().max()) > 0
    assert float(block.mlp.down_proj.weight.grad.abs().max()) > 0


@pytest.mark.parametrize(("count", "new", "origins"), [(4, 4, [0, 0, 1, 1, 2, 2, 3, 3]), (5, 2, [0, 1, 1, 2, 3, 4, 4]), (1, 1, [0, 0])])
def test_blocks_are_spread_evenly(count: int, new: int, origins: list[int]) -> None:
    assert interleaved(count, new)[0] == origins


@pytest.mark.parametrize(
    ("kind", "growth", "said"),
    [
        ("gpt2", GrowExperts(), "has no sibling with experts"),
        ("llama", GrowBlocks(num_blocks=5), "5 for a model with 4 layers"),
        ("llama", GrowDepth(left_out=2), "the result would have 4"),
        ("qwen3", GrowExperts(), "changes what a `qwen3` computes"),
    ],
)
def test_a_growth_that_does_not_fit_is_refused(kind: str, growth: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        grow(make(kind), growth, 1)


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        ("{kind: blocks, num_blocks: 99}", "99 for a model with "),
        ("{kind: depth, left_out: 90}", "the result would have 0"),
        ("{kind: experts}", "a `gpt2` has no sibling with experts"),
        ("{kind: width}", None),
    ],
)
def test_a_fast_check_tells_what_the_configuration_tells(
    growth: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ftcli.builtin import catalogue
    from ftcli.cli.main import run

    shutil.copytree(catalogue.model_folder("tiny"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, **({"model_type": "gpt2"} if "experts" in growth else {})}))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"version: 1\nname: a\nmodel: {{base: base, grow: {growth}}}\nmethod: {{kind: full}}\n"
        "data: {train: [{source: {kind: builtin, name: stories}}]}\n"
    )
    assert run(["check", str(path), "--fast"]) == (0 if said is None else 2)
    assert said is None or said in capsys.readouterr().err


def test_a_growth_that_changes_what_is_computed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftcli.models.grow.blocks._silenced", lambda model, stack, layer: {})
    with pytest.raises(RequestError, match="and it must not"):
        grow(make("llama"), GrowBlocks(num_blocks=1), 1)


@pytest.mark.parametrize(
    ("method", "said"), [("{kind: lora}", "method `lora` leaves an adapter"), ("{kind: freeze, grown: true}", "the base is not grown")]
)
def test_a_recipe_that_cannot_grow_is_refused_at_load(method: str, said: str, tmp_path: Path) -> None:
    grows = ", grow: {kind: blocks}" if "lora" in method else ""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"version: 1\nname: a\nmodel: {{base: 'builtin:tiny'{grows}}}\n"
        f"data: {{train: [{{source: {{kind: builtin, name: stories}}}}]}}\nmethod: {method}\n"
    )
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)
