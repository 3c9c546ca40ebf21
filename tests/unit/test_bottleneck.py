"""Bottleneck adapters on tiny real models: where they sit, that they start as nothing, files, several at once, and what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ftcli.data.tree import SPAN, TokenTree, path_tree, target_weights
from ftcli.errors import RequestError
from ftcli.layout.build import build_batch
from ftcli.layout.model import TreeModel
from ftcli.methods.bottleneck.layer import ADAPTERS, bottleneck_layers
from ftcli.methods.bottleneck.reduction import factor_of_each
from ftcli.methods.bottleneck_adapter import BottleneckAdapter
from ftcli.methods.context import AttachContext
from ftcli.models.load import load_model
from ftcli.models.settings import Init, Model

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
EIGHT = {**LLAMA, "head_dim": 8}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", EIGHT),
    "mistral": ("mistral", LLAMA),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", {**LLAMA, **EXPERTS}),
    "gemma2": ("gemma2", EIGHT),
    "gemma3": ("gemma3_text", EIGHT),
    "phi": ("phi", LLAMA),
    "phi3": ("phi3", {**LLAMA, "pad_token_id": 0}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "gpt_neox, parallel residual": ("gpt_neox", NEOX),
    "gpt_neox": ("gpt_neox", {**NEOX, "use_parallel_residual": False}),
    "opt": ("opt", {**OPT, "word_embed_proj_dim": 32}),
    "falcon, parallel": ("falcon", {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}),
    "falcon": ("falcon", {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "parallel_attn": False}),
    "starcoder2": ("starcoder2", LLAMA),
    "olmo": ("olmo", LLAMA),
    "olmo2": ("olmo2", LLAMA),
    "smollm3": ("smollm3", {**LLAMA, "pad_token_id": 0}),
    "bloom": ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 2}),
}
PARALLEL = {"phi", "gpt_neox, parallel residual", "falcon, parallel"}
POST_NORM = {"gemma2", "gemma3", "olmo2"}
PRESETS = ("houlsby", "pfeiffer", "parallel")
VOCABULARY = 97
IDS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))


@cache
def kept_base(name: str) -> Any:
    architecture, sizes = MODELS[name]
    special: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    if architecture != "opt":
        special["initializer_range"] = 0.2
    return load_model(Model(init=Init(architecture=architecture, config={**special, **sizes})), None, seed=3).eval()


def base(name: str = "llama") -> Any:
    return copy.deepcopy(kept_base(name))


def attached(name: str = "llama", **settings: Any) -> Any:
    settings = {"reduction_factor": 4.0, **settings}
    return BottleneckAdapter(**settings).attach(base(name), AttachContext(seed=5)).eval()


def stirred(module: Any, seed: int = 1) -> Any:
    """The module with random adapters, none of them nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def one_path(tokens: torch.Tensor) -> TokenTree:
    return path_tree(tokens.numpy().astype(np.int32), np.array([(1, len(tokens), 1.0, False)], dtype=SPAN), 0, 0)


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", list(MODELS))
def test_the_start_is_the_base_and_every_adapter_learns(name: str, preset: str) -> None:
    module = attached(name, preset=preset)
    assert torch.equal(logits(module), logits(base(name)))
    stirred(module).train()
    module(IDS, labels=IDS, use_cache=False).loss.backward()
    trained = [(parameter_name, p) for parameter_name, p in module.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * len(list(bottleneck_layers(module)))
    assert all(f".{ADAPTERS}." in parameter_name and p.grad.abs().sum() > 0 for parameter_name, p in trained)
    assert (logits(module.eval()) - logits(base(name))).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(MODELS))
def test_there_is_one_place_at_each_attention_and_each_feed_forward(name: str) -> None:
    places = [layer.place for _, layer in bottleneck_layers(attached(name, preset="houlsby"))]
    assert [(place.layer, place.kind) for place in places] == [(i, kind) for i in (0, 1) for kind in ("attention", "feed_forward")]
    assert [place.name for place in places if place.kind == "attention" and "att" not in place.name] == []


@pytest.mark.parametrize("name", [name for name in MODELS if name not in POST_NORM])
def test_a_parallel_adapter_reads_the_stream_that_the_sub_block_is_added_to(name: str) -> None:
    """Seen from outside: what the layer gives, less what the feed-forward network gives, is what the adapter read."""
    module = attached(name, preset="parallel")
    read, given, entered, left = [], [], [], []
    for _, place in bottleneck_layers(module):
        place.bottleneck_adapters["default"].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        place.base_layer.register_forward_hook(lambda _, inputs, out: given.append((out[0] if isinstance(out, tuple) else out).clone()))
        name_of_layer = ".".join(place.place.name.split(".")[:-1])
        layer = module.get_base_model().get_submodule(name_of_layer)
        layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        layer.register_forward_hook(lambda _, inputs, out: left.append(out[0] if isinstance(out, tuple) else out))
    logits(module)
    for index in range(2):
        stream = read[index].reshape(left[index].shape)
        if name in PARALLEL:
            torch.testing.assert_close(stream, entered[index])
        elif name == "bloom":  # its feed-forward network adds the stream itself
            assert torch.equal(given[index], left[index])
            assert not torch.equal(stream, entered[index])
        else:
            torch.testing.assert_close(stream, left[index] - given[index].reshape(left[index].shape))


@pytest.mark.parametrize("name", sorted(POST_NORM))
def test_before_a_norm_after_the_sub_block_the_stream_is_the_one_before_it(name: str) -> None:
    module = attached(name, preset="parallel", mh_adapter=True)
    read: list[torch.Tensor] = []
    layers = dict(bottleneck_layers(module))
    for layer in layers.values():
        layer.bottleneck_adapters["default"].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        hidden = module(IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(read[0], hidden[0])
    assert torch.equal(read[2], hidden[1])
    assert not torch.equal(read[1], hidden[0])


@pytest.mark.parametrize("placement", ["output", "stream", "parallel"])
def test_what_is_added_is_what_the_formula_says(placement: str) -> None:
    """One Llama layer by hand: y = x + attention(x), then y + f + adapter(f | y + f | y)."""
    module = stirred(attached(preset="parallel", placement=placement, mh_adapter=False, non_linearity="gelu", scaling=3.0))
    model = module.get_base_model().model
    streams: list[torch.Tensor] = []
    model.layers[0].post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    with torch.no_grad():
        found = module(IDS, use_cache=False, output_hidden_states=True).hidden_states[1]
        stream, layer = streams[0], model.layers[0].mlp
        forward = layer.base_layer(model.layers[0].post_attention_layernorm(stream))
        read = {"output": forward, "stream": stream + forward, "parallel": stream}[placement]
        part = layer.bottleneck_adapters["default"]
        narrow = torch.nn.functional.gelu(read @ part.down.weight.T + part.down.bias)
        expected = stream + forward + 3.0 * (narrow @ part.up.weight.T + part.up.bias)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox, parallel residual", "mixtral"])
def test_forest_and_rows_compute_the_same(name: str) -> None:
    trees = [one_path(row[:length]) for row, length in zip(IDS, (12, 7, 9), strict=True)]
    weights = [target_weights(tree, 1.0) for tree in trees]
    for preset in PRESETS:
        model = TreeModel(stirred(attached(name, preset=preset, gating=True)))
        found = {}
        for layout in ("rows", "forest"):
            model.use_layout(layout)
            with torch.no_grad():
                found[layout] = model(build_batch(layout, trees, weights, 0))
        torch.testing.assert_close(found["forest"], found["rows"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_what_is_saved_computes_the_same_in_ftcli_and_in_peft(name: str, preset: str, tmp_path: Path) -> None:
    from peft import PeftModel

    settings = {"preset": preset, "reduction_factor": {"0": 8.0, "default": 4.0}, "norm_before": True, "scaling": "learned", "gating": True}
    method = BottleneckAdapter(**settings)  # type: ignore[arg-type]
    module = stirred(method.attach(base(name), AttachContext(seed=5)).eval())
    method.save(module, tmp_path)
    expected = logits(module)
    assert torch.equal(logits(method.load(base(name), tmp_path)), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base(name), tmp_path)), expected)
    module.save_pretrained(tmp_path / "by-peft")
    assert torch.equal(logits(method.load(base(name), tmp_path / "by-peft")), expected)


def test_a_fresh_process_loads_it_once_the_tuner_is_imported(tmp_path: Path) -> None:
    module = stirred(attached())
    BottleneckAdapter().save(module, tmp_path / "adapter")
    base().save_pretrained(tmp_path / "base")
    torch.save(logits(module), tmp_path / "expected")
    code = (
        "import sys, torch; import ftcli.methods.bottleneck.tuner\n"
        "from peft import AutoPeftModelForCausalLM, PeftModel; from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "module = PeftModel.from_pretrained(base, sys.argv[1] + '/adapter').eval()\n"
        f"ids = torch.tensor({IDS.tolist()})\n"
        "print(float((module(ids).logits - torch.load(sys.argv[1] + '/expected')).abs().max()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 0


def test_several_adapters_on_one_base_are_switched_disabled_stacked_and_deleted() -> None:
    houlsby, pfeiffer = BottleneckAdapter(reduction_factor=4.0), BottleneckAdapter(preset="pfeiffer", reduction_factor=8.0)
    alone = {
        "default": logits(stirred(houlsby.attach(base(), AttachContext(seed=5)).eval(), 1)),
        "second": logits(stirred(pfeiffer.attach(base(), AttachContext(seed=5)).eval(), 2)),
    }
    module: Any = stirred(houlsby.attach(base(), AttachContext(seed=5)).eval(), 1)
    module.add_adapter("second", pfeiffer.peft_config())
    assert {name.split(".")[-3] for name, p in module.named_parameters() if p.requires_grad} == {"default"}
    assert torch.equal(logits(module), alone["default"])
    module.set_adapter("second")
    assert {name.split(".")[-3] for name, p in module.named_parameters() if p.requires_grad} == {"second"}
    stirred(module, 2)
    for name in ("second", "default", "second"):
        module.set_adapter(name)
        assert torch.equal(logits(module), alone[name])
    with module.disable_adapter():
        assert torch.equal(logits(module), logits(base()))
    module.base_model.set_adapter(["default", "second"])
    assert not any(torch.equal(logits(module), found) for found in alone.values())
    module.set_adapter("default")
    module.delete_adapter("second")
    assert torch.equal(logits(module), alone["default"])
    assert torch.equal(logits(module.unload()), logits(base()))


def test_unloading_leaves_no_hook_behind() -> None:
    module = attached(preset="pfeiffer")
    norm = module.get_base_model().model.layers[0].post_attention_layernorm
    assert len(norm._forward_hooks) == 1
    module.unload()
    assert len(norm._forward_hooks) == 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon, parallel", "olmo2"])
def test_gradient_checkpointing_changes_no_gradient(name: str, preset: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        module = stirred(attached(name, preset=preset))
        for dropout in module.modules():
            if isinstance(dropout, torch.nn.Dropout):
                dropout.p = 0.0
        module.get_base_model().config.dropout = 0.0
        if checkpointing:
            module.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        module.train()
        torch.manual_seed(0)
        module(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_adapter_is_float32_on_a_bfloat16_base_and_its_start_is_identity() -> None:
    model = base().to(torch.bfloat16)
    plain = logits(model)
    module = BottleneckAdapter().attach(model, AttachContext(seed=5)).eval()
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert logits(module).dtype == torch.bfloat16
    assert torch.equal(logits(module), plain)


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    def first(seed: int, disturbance: int, init: Any = "bert") -> torch.Tensor:
        torch.manual_seed(disturbance)
        module = BottleneckAdapter(init=init).attach(base(), AttachContext(seed=seed))
        return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])

    assert torch.equal(first(1, 10), first(1, 11))
    assert not torch.equal(first(1, 10), first(2, 10))
    assert first(1, 0, "houlsby").abs().max() <= 0.02
    assert 0.015 < first(1, 0, "bert")[:32].std() < 0.025


@pytest.mark.parametrize("init", ["bert", "houlsby"])
def test_other_starts_are_near_the_base_but_not_the_base(init: Any) -> None:
    difference = (logits(attached(init=init)) - logits(base())).abs().max()
    assert 0 < difference < 0.5


def test_presets_are_those_of_the_literature_and_parts_overrule_them() -> None:
    houlsby, pfeiffer, parallel = (BottleneckAdapter(preset=preset).peft_config() for preset in PRESETS)  # type: ignore[arg-type]
    assert [config.mh_adapter for config in (houlsby, pfeiffer, parallel)] == [True, False, False]
    assert [config.placement for config in (houlsby, pfeiffer, parallel)] == ["output", "stream", "parallel"]
    assert [config.non_linearity for config in (houlsby, pfeiffer, parallel)] == ["swish", "relu", "relu"]
    assert [config.scaling for config in (houlsby, pfeiffer, parallel)] == [1.0, 1.0, 4.0]
    assert BottleneckAdapter(preset="sequential").peft_config() == pfeiffer
    assert BottleneckAdapter(preset="double-sequential").peft_config() == houlsby
    mixed = BottleneckAdapter(preset="pfeiffer", mh_adapter=True, scaling=2.0, non_linearity="tanh").peft_config()
    assert (mixed.mh_adapter, mixed.scaling, mixed.non_linearity, mixed.placement) == (True, 2.0, "tanh", "stream")


def test_width_of_every_layer_and_layers_left_out() -> None:
    def sizes(**settings: Any) -> list[tuple[int, int]]:
        layers = bottleneck_layers(attached(preset="pfeiffer", **settings))
        return [(layer.place.layer, layer.bottleneck_adapters["default"].down.out_features) for _, layer in layers]

    assert sizes(reduction_factor=16.0) == [(0, 2), (1, 2)]
    assert sizes(reduction_factor={"0": 8.0, "default": 16.0}) == [(0, 4), (1, 2)]
    assert sizes(reduction_factor={"0-1": 64.0}) == [(0, 1), (1, 1)]
    assert sizes(reduction_factor=0.5) == [(0, 64), (1, 64)]
    assert sizes(leave_out=(0,)) == [(1, 8)]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"0": 8.0}, "layer 1 has none"),
        ({"0-2": 8.0}, "`0-2` names layers that do"),
        ({"5": 8.0, "default": 2.0}, "`5` names layers"),
    ],
)
def test_reduction_factors_that_do_not_fit_are_refused(factors: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        factor_of_each(factors, 2)
    with pytest.raises(RequestError, match=message):
        attached(reduction_factor=factors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"leave_out": (2,)}, "layer 2 does not exist"),
        ({"leave_out": (0, 1)}, "no layer gets an adapter"),
        ({"mh_adapter": False, "output_adapter": False}, "no layer gets an adapter"),
    ],
)
def test_what_leaves_no_adapter_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        attached(**settings)


@pytest.mark.parametrize("value", [0.0, -1.0, {"0-": 2.0}, {"default": 0.0}, {"all": 2.0}])
def test_impossible_reduction_factors_are_refused_at_load(value: Any) -> None:
    with pytest.raises(ValidationError, match="allowed"):
        BottleneckAdapter(reduction_factor=value)


def test_a_model_without_feed_forward_says_so() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    mamba = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY))
    with pytest.raises(RequestError, match=r"no layer gets an adapter \(2 layers with attention"):
        BottleneckAdapter(preset="pfeiffer").attach(mamba, AttachContext(seed=5))


def test_merging_is_refused_with_the_reason_and_the_way_out() -> None:
    module = attached()
    with pytest.raises(RequestError, match="non-linearity between its matrices") as refusal:
        BottleneckAdapter().merge(module)
    assert "kind: lora" in str(refusal.value)
    with pytest.raises(RequestError, match="cannot be merged"):
        module.merge_and_unload()


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "kind", "weights", "config"])
def test_an_adapter_that_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    method = BottleneckAdapter()
    method.save(attached(), tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    first = sorted(tensors)[0]
    if damage == "missing":
        del tensors[first]
    elif damage == "unexpected":
        tensors["base_model.model.other.weight"] = tensors[first].clone()
    elif damage == "shape":
        tensors[first] = tensors[first][:1].clone()
    elif damage == "kind":
        fields["peft_type"] = "LORA"
    save_file(tensors, weights)
    config.write_text("[" if damage == "config" else json.dumps(fields))
    if damage == "weights":
        weights.write_bytes(b"{}")
    message = {
        "missing": "1 tensors not in the file",
        "unexpected": "without a place in the model",
        "shape": "of another shape",
        "kind": "peft_type is `LORA`",
        "weights": "cannot read adapter_model.safetensors",
        "config": "cannot read adapter_config.json",
    }[damage]
    with pytest.raises(RequestError, match=message):
        method.load(base(), tmp_path)


def test_generation_with_a_cache_equals_the_full_forward_pass() -> None:
    for preset in PRESETS:
        module = stirred(attached(preset=preset))
        answer = module.generate(IDS[:1, :6], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        with torch.no_grad():
            best = module(answer[:, :-1], use_cache=False).logits[0, 5:].argmax(-1)
        assert torch.equal(best, answer[0, 6:])
