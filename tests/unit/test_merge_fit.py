"""What headers and JSON tell of a merge that cannot be right is refused before a tensor is read; nothing infinite is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.merge_models import LLAMA, family, llama_shapes, merged, planned, random_values, read_values, refused, write_model, write_tensors

from ftcli.cli.main import run
from ftcli.errors import GateError, RequestError, RunError, UsageError
from ftcli.files import check_place, new_folder
from ftcli.merging.engine import working_folder
from ftcli.merging.fit import expected_shapes
from ftcli.merging.global_trim import TrimmedTensor, global_limits
from ftcli.merging.numbers import STORED, are_finite, from_float32
from ftcli.merging.outcome import merge_models
from ftcli.merging.sources import open_source
from ftcli.merging.stored import OpenFiles, folder_tensors

GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": None,
    "tie_word_embeddings": True,
}


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (40, 16), "transformer.wpe.weight": (64, 16)}
    inner = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 64), "mlp.c_proj": (64, 16), "ln_1": (16,), "ln_2": (16,)}
    for layer in range(3):
        shapes |= {f"transformer.h.{layer}.{name}.weight": shape for name, shape in inner.items()}
    return shapes | {"transformer.ln_f.weight": (16,)}


def franken(first: str, second: str) -> str:
    parts = [f"  - sources: [{{model: {name}, layer_range: [{begin}, {end}]}}]\n" for name, begin, end in ((first, 0, 2), (second, 1, 3))]
    return "merge_method: passthrough\nslices:\n" + "".join(parts)


WITH_SCALING = {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32, "head_dim": 8}, "hidden_size is 16 and 32"),
        ({"intermediate_size": 32}, "intermediate_size is 24 and 32"),
        ({"num_attention_heads": 8, "head_dim": 2}, "num_attention_heads is 4 and 8"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_theta is 10000.0 and 1000000.0"),
        ({"rope_theta": 500000.0, "rope_parameters": None}, "rope_theta is 10000.0 and 500000.0"),
        (WITH_SCALING, "the scaling of positions is none and {'factor': 2.0, 'rope_type': 'linear'}"),
        ({"hidden_act": "gelu"}, "hidden_act is silu and gelu"),
        ({"model_type": "mistral"}, "its layers are a mistral's, and the configuration that is written (`a`'s) is a llama's"),
    ],
)
def test_layers_that_one_configuration_cannot_say_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {**LLAMA, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "hidden_act": "silu"}
    for name, own in (("a", config), ("b", {**config, **change})):
        write_model(tmp_path / name, random_values(llama_shapes(own), 1), own)
    assert message in refused(tmp_path, franken("a", "b"))
    assert planned(tmp_path, franken("b", "b"))


def test_the_precision_of_norms_may_differ_and_is_a_warning(tmp_path: Path) -> None:
    for name, precision in (("a", 1e-5), ("b", 1e-6)):
        write_model(tmp_path / name, random_values(llama_shapes(LLAMA), 1), {**LLAMA, "rms_norm_eps": precision})
    warnings = planned(tmp_path, franken("a", "b")).warnings
    assert any("the layers of `b` will compute with `a`'s configuration: rms_norm_eps is 1e-05 and 1e-06" in text for text in warnings)


def test_another_architecture_is_refused_whatever_its_configuration_says(tmp_path: Path) -> None:
    family(tmp_path, count=1)
    write_model(tmp_path / "g", random_values(gpt2_shapes(), 1), GPT2)
    assert "its layers are a gpt2's" in refused(tmp_path, franken("a", "g"))
    write_model(tmp_path / "liar", random_values(gpt2_shapes(), 1), {**GPT2, "model_type": "llama"})
    assert "has tensors that `a` has in no layer: `transformer.h.2.attn.c_attn.weight`" in refused(tmp_path, franken("a", "liar"))


def test_shapes_are_compared_across_slices_where_no_configuration_tells(tmp_path: Path) -> None:
    family(tmp_path, count=1)
    strange = {**LLAMA, "model_type": "strange"}
    write_model(tmp_path / "s", random_values(llama_shapes(LLAMA), 1), strange)
    write_model(tmp_path / "wide", random_values(llama_shapes({**LLAMA, "intermediate_size": 32}), 1), strange)
    text = refused(tmp_path, franken("s", "wide"))
    assert "wide: has other shapes" in text
    assert "[16, 32], `s` has [16, 24]" in text
    wordy = {**strange, "vocab_size": 44}
    write_model(tmp_path / "wordy", random_values(llama_shapes(wordy), 1), wordy)
    assert "`lm_head.weight` is [44, 16], `s` has [40, 16]" in refused(tmp_path, franken("s", "wordy"))


@pytest.mark.parametrize(
    ("shapes", "config", "change"),
    [
        (llama_shapes(LLAMA), LLAMA, {"hidden_size": 20}),
        (llama_shapes(LLAMA), LLAMA, {"vocab_size": 41}),
        (llama_shapes(LLAMA), LLAMA, {"num_key_value_heads": 4}),
        (gpt2_shapes(), GPT2, {"n_embd": 20}),
        (gpt2_shapes(), GPT2, {"n_inner": 40}),
    ],
)
def test_weights_that_do_not_belong_to_their_configuration_are_refused(
    shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], change: dict[str, Any], tmp_path: Path
) -> None:
    write_model(tmp_path / "a", random_values(shapes, 1), config)
    write_model(tmp_path / "b", random_values(shapes, 1), {**config, **change})
    assert planned(tmp_path, "merge_method: passthrough\nmodels: [a]\n")
    assert "the configuration of `b` says other shapes" in refused(tmp_path, "merge_method: passthrough\nmodels: [b]\n")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "gpt2"])
@pytest.mark.parametrize("with_head_dim", [False, True])
def test_expected_shapes_are_those_of_transformers(kind: str, with_head_dim: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {key: LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    sizes |= {"head_dim": 8} if with_head_dim and kind != "olmo2" else {}
    if kind == "gpt2":
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_inner": 24 if with_head_dim else None}
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        found = {name: tuple(value.shape) for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    for said in (config.to_dict(), {"model_type": kind, **sizes}):
        expected = expected_shapes(said)
        compared = 0
        for name, shape in found.items():
            key = "embedding" if name.endswith(("embed_tokens.weight", "wte.weight")) else name.split(".0.")[-1]
            if key in expected:
                compared += 1
                assert all(size in (None, actual) for size, actual in zip(expected[key], shape, strict=True)), (name, shape, expected[key])
        assert compared >= len(expected) - (kind == "olmo2")  # it has no norm before its layers


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_copied_tensor_that_is_not_finite_is_refused(dtype: str, value: float, tmp_path: Path) -> None:
    base = family(tmp_path, count=0, dtype="F32")
    broken = base["model.embed_tokens.weight"].copy()
    broken[17, 3] = value
    write_model(tmp_path / "broken", {**base, "model.embed_tokens.weight": broken}, dtype=dtype)
    with pytest.raises(GateError, match="`broken` has them already"):
        merged(tmp_path, "merge_method: passthrough\nmodels: [broken]\n")
    assert not (tmp_path / "out").exists()
    assert not working_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_finite_numbers_of_any_size_are_finite(dtype: str) -> None:
    numbers = np.array([0, -0.0, 1, -65504, 6e-8], np.float32)
    stored = from_float32(numbers, dtype)
    assert are_finite(stored, dtype)
    assert not are_finite(np.append(stored, from_float32(np.array([np.inf], np.float32), dtype)).astype(STORED[dtype]), dtype)


def test_eight_bit_floats_are_looked_at_and_whole_numbers_are_not() -> None:
    def of(*values: int) -> np.ndarray[Any, Any]:
        return np.array(values, np.uint8).view("V1")

    assert are_finite(of(0x7E, 0xFE), "F8_E4M3")
    assert not are_finite(of(0, 0xFF), "F8_E4M3")
    assert are_finite(of(0x7B, 0xFB), "F8_E5M2")
    assert not are_finite(of(0xFC), "F8_E5M2")
    assert are_finite(of(0xFF), "U8")


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base = family(tmp_path, count=0, dtype="F32")
    write_adapter(tmp_path / "adapter", base, value=np.nan)
    with pytest.raises(GateError, match=r"`base\+adapter` has them already"):
        merged(tmp_path, "merge_method: passthrough\nmodels: [base+adapter]\n")
    with pytest.raises(RequestError, match="NaN or infinite"):
        merged_adapters(tmp_path)


def write_adapter(folder: Path, base: Mapping[str, Any], *, value: float = 0.5, **changes: Any) -> Path:
    """A LoRA on one query projection."""
    folder.mkdir()
    weight = base["model.layers.0.self_attn.q_proj.weight"]
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    first, second = np.full((2, weight.shape[1]), value, np.float32), np.full((weight.shape[0], 2), value, np.float32)
    write_tensors(folder / "adapter_model.safetensors", {f"{name}.lora_A.weight": ("F32", first), f"{name}.lora_B.weight": ("F32", second)})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "base", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged_adapters(folder: Path) -> None:
    from ftcli.merging.special import open_special

    (folder / "svd.yaml").write_text("merge_method: lora_svd\nmodels: [adapter]\nparameters: {rank: 1}\nbase_model: base\n")
    special = open_special(folder / "svd.yaml")
    assert special is not None
    special.run(folder / "svd", threads=1, verify=False, say=lambda *_: None, note=lambda _: None)


@pytest.mark.parametrize("method", ["karcher", "multislerp"])
def test_means_on_the_sphere_say_who_is_not_finite_and_leave_nothing(method: str, tmp_path: Path) -> None:
    base = family(tmp_path, count=1, dtype="F32")
    write_model(tmp_path / "broken", {name: value * np.float32(np.nan) for name, value in base.items()}, dtype="F32")
    recipe = f"merge_method: {method}\nmodels: [a, broken]\nparameters: {{weight: 1}}\n"
    with pytest.raises(GateError, match="`broken` has them already"):
        merged(tmp_path, recipe)
    write_model(tmp_path / "opposite", {name: -value for name, value in read_values(tmp_path / "a").items()}, dtype="F32")
    with pytest.raises(RunError, match="cancel"):
        merged(tmp_path, recipe.replace("broken", "opposite"))
    assert not working_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("merge_method: linear\nmodels: [a, b]\nparameters: {weight: 0, normalize: false}\n", "the weights are all 0"),
        ("merge_method: passthrough\nmodels: [a]\nparameters: {scale: 0}\n", "every tensor is scaled by 0"),
        (
            "merge_method: linear\nmodels: [a, b]\nparameters: {weight: 1.0e+39}\n",
            "allowed: a number that is finite in float32",
        ),
        ("merge_method: linear\nmodels: [a]\nparameters: {weight: 1}\nchat_template: '{{ broken'\n", "the template is no valid Jinja"),
        (
            "merge_method: ties\nbase_model: base\nmodels: [a]\nparameters: {weight: 1, density: [0.1, 0.9], scope: global}\n",
            "one density for each model",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(recipe: str, message: str, tmp_path: Path) -> None:
    family(tmp_path, count=2)
    assert message in refused(tmp_path, recipe)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"model": {"vocab": {}}}', '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": {"a": 0}, "merges": ["a"]}}']
)
def test_a_damaged_tokenizer_is_refused_where_it_is_needed(text: str, tmp_path: Path) -> None:
    family(tmp_path, count=2)
    for name in "ab":
        (tmp_path / name / "tokenizer.json").write_text(text if name == "b" else '{"model": {"vocab": {"a": 0}, "merges": []}}')
    recipe = "merge_method: linear\nmodels: [a, b]\nparameters: {weight: 1}\ntokenizer: {source: union}\n"
    assert "`b`: tokenizer.json" in refused(tmp_path, recipe)


def test_two_ways_of_saying_the_same_positions_are_the_same(tmp_path: Path) -> None:
    forms: list[dict[str, Any]] = [
        {"rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}},
    ]
    for name, form in zip("ab", forms, strict=True):
        write_model(tmp_path / name, random_values(llama_shapes(LLAMA), 1), {**LLAMA, **form})
    assert planned(tmp_path, franken("a", "b"))


def test_some_tensors_may_be_scaled_by_zero(tmp_path: Path) -> None:
    family(tmp_path, count=1)
    out = merged(tmp_path, "merge_method: passthrough\nmodels: [a]\nparameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}\n")
    assert not read_values(out)["model.layers.1.self_attn.o_proj.weight"].any()


def test_a_model_that_says_nothing_is_not_proven(tmp_path: Path) -> None:
    base = family(tmp_path, count=0)
    write_model(tmp_path / "zeros", {name: np.zeros_like(value) for name, value in base.items()})
    (tmp_path / "r.yaml").write_text("merge_method: passthrough\nmodels: [zeros]\n")
    with pytest.raises(GateError, match="says nothing"):
        merge_models(tmp_path / "r.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "[]", "found a list, allowed: a JSON object"),
        ("config.json", "{", "it is no JSON"),
        ("config.json", '{"num_hidden_layers": "3"}', "its `num_hidden_layers` is '3', allowed: a whole number"),
        ("config.json", b"\xff\xfe", "it is no JSON"),
        ("model.safetensors.index.json", "{}", "has no `weight_map`"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "has no `weight_map`"),
        ("generation_config.json", "[1]", "found a list"),
        ("tokenizer_config.json", "[1]", "found a list"),
        ("model.safetensors", b"\x02\0\0\0\0\0\0\0[]", "its header is no JSON object"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0" + b'{"a":{}}', "its header is damaged at `a`"),
    ],
)
def test_a_damaged_model_is_refused_with_the_file(file: str, text: str | bytes, message: str, tmp_path: Path) -> None:
    family(tmp_path, count=1)
    (tmp_path / "a" / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(tmp_path, "merge_method: passthrough\nmodels: [a]\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": None}, "`lora_alpha` is null, allowed: a number"),
        ({"lora_alpha": "x"}, '`lora_alpha` is "x", allowed: a number'),
        ({"alpha_pattern": [1]}, "`alpha_pattern` is"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
    ],
)
def test_an_adapter_whose_scale_is_no_number_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = family(tmp_path, count=0)
    write_adapter(tmp_path / "adapter", base, **changes)
    assert message in refused(tmp_path, "merge_method: passthrough\nmodels: [base+adapter]\n")
    with pytest.raises(RequestError) as caught:
        merged_adapters(tmp_path)
    assert message in str(caught.value)


def test_an_adapter_of_another_base_is_a_warning(tmp_path: Path) -> None:
    base = family(tmp_path, count=1)
    for number, (noted, is_doubted) in enumerate(
        [("base", False), (str(tmp_path / "base"), False), ("/elsewhere/base", False), ("org/other", True), (str(tmp_path / "a"), True)]
    ):
        write_adapter(tmp_path / f"l{number}", base, base_model_name_or_path=noted)
        warnings = planned(tmp_path, f"merge_method: passthrough\nmodels: [base+l{number}]\n").warnings
        assert any(f"was trained on `{noted}`" in text for text in warnings) is is_doubted


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{model: {path: a}}", "a"),
        ("{model: a}", "a"),
        ("{model: {path: base}, lora: {path: adapter}}", "base+adapter"),
        ("{model: base, lora: adapter}", "base+adapter"),
    ],
)
def test_the_long_form_of_a_model_is_the_short_one(written: str, meant: str, tmp_path: Path) -> None:
    base = family(tmp_path, count=1)
    write_adapter(tmp_path / "adapter", base)
    plan = planned(tmp_path, f"merge_method: linear\nmodels: [{{model: {written}, parameters: {{weight: 1}}}}]\nbase_model: {written}\n")
    assert [source.reference for source in plan.sources] == [meant]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{path: a}", "missing key `model`"),
        ("{model: {pth: a}}", "did you mean `path`?"),
        ("{model: {path: 3}}", "models.0.model.model.path (line 2"),
        ("{model: a, lora: [1]}", "models.0.model.lora (line 2"),
        ("{model: a, override_architecture: X}", "remove it"),
    ],
)
def test_a_wrong_long_form_is_refused_with_its_place(written: str, message: str, tmp_path: Path) -> None:
    family(tmp_path, count=1)
    assert message in refused(tmp_path, f"merge_method: linear\nmodels: [{{model: {written}, parameters: {{weight: 1}}}}]\n")


def test_the_same_folder_by_another_spelling_has_the_same_random_bits(tmp_path: Path) -> None:
    family(tmp_path, count=2)
    recipe = "merge_method: dare_linear\nbase_model: base\nmodels: [{}, {}]\nparameters: {{weight: 0.5, density: 0.5}}\n"
    first = read_values(merged(tmp_path, recipe.format("a", "b"), "one"))
    second = read_values(merged(tmp_path, recipe.format("b/", "./a"), "two"))
    third = read_values(merged(tmp_path, recipe.format("b", str(tmp_path / "a")), "three"))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert any(first[name].tobytes() != third[name].tobytes() for name in first)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=4), st.sampled_from([0, 0.01, 0.3, 0.5, 0.9, 1]))
@settings(max_examples=150, deadline=None)
def test_a_global_trim_keeps_exactly_so_many_and_ties_by_name_and_position(values: list[list[int]], density: float) -> None:
    arrays = {f"t{9 - number}": np.array([own], np.float32) for number, own in enumerate(values)}

    def tensor(name: str) -> TrimmedTensor:
        # pieces of at most four numbers
        pieces = [arrays[name][:, begin : begin + 4] for begin in range(0, arrays[name].size, 4)]
        return TrimmedTensor(name, ("m",), arrays[name].size, lambda: iter([[piece] for piece in pieces]))

    def one_by_one(count: Callable[[Any], None], items: Iterable[Any]) -> None:
        for item in items:
            count(item)

    limits = global_limits([tensor(name) for name in arrays], {"m": density}, one_by_one)
    places = [(name, index) for name in sorted(arrays) for index in range(arrays[name].size)]
    count = 0 if density == 0 else max(1, int(density * len(places)))
    expected = set(sorted(places, key=lambda place: -arrays[place[0]][0, place[1]])[:count])
    found = set()
    for name, array in arrays.items():
        for number, begin in enumerate(range(0, array.size, 4)):
            mask = limits[name, "m"].mask(array[:, begin : begin + 4], number)
            found |= {(name, begin + int(index)) for index in np.flatnonzero(mask)}
    assert found == expected


def test_a_global_trim_of_files_keeps_exactly_so_many(tmp_path: Path) -> None:
    family(tmp_path, count=2)  # bfloat16: many changes are equal
    recipe = "merge_method: ties\nbase_model: base\nmodels: [a]\nparameters: {weight: 1, density: 0.1, scope: global}\ndtype: float32\n"
    out, base = read_values(merged(tmp_path, recipe)), read_values(tmp_path / "base")
    size = sum(value.size for value in base.values())
    assert sum(int((out[name] != base[name]).sum()) for name in base) == int(0.1 * size)


@pytest.mark.parametrize("command", ["merge", "adapters", "export", "extract-lora", "cold"])
def test_an_output_under_a_file_is_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "adapter", family(tmp_path, count=1))
    (tmp_path / "file").write_text("x")
    (tmp_path / "r.yaml").write_text("merge_method: passthrough\nmodels: [a]\n")
    (tmp_path / "l.yaml").write_text("merge_method: lora_concat\nmodels: [adapter]\n")
    arguments = {
        "merge": ["merge", "r.yaml", "-o", "file/x"],
        "adapters": ["merge", "l.yaml", "-o", "file/x/y"],
        "export": ["export", "a", "--to", "hf", "-o", "file/x"],
        "extract-lora": ["extract-lora", "a", "--base", "base", "-o", "file/x"],
        "cold": ["cold", "init", "file/x", "--base", "base"],
    }
    assert run(arguments[command]) == 2
    assert "`" + str(tmp_path / "file") + "` is no folder" in capsys.readouterr().err


def test_no_folder_is_made_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="it is a file"), new_folder(tmp_path / "file"):
        pass
    with pytest.raises(UsageError, match="is no folder"), new_folder(tmp_path / "file" / "x"):
        pass
    assert (tmp_path / "file").read_text() == "x"
    check_place(tmp_path / "not" / "there" / "yet")


def test_a_run_with_a_damaged_recipe_is_refused(tmp_path: Path) -> None:
    family(tmp_path, count=0)
    run_folder = tmp_path / "run"
    write_adapter(run_folder.with_name("adapter"), read_values(tmp_path / "base"))
    run_folder.mkdir()
    shutil.move(tmp_path / "adapter", run_folder / "adapter")
    (run_folder / "recipe.resolved.yaml").write_text("{")
    with pytest.raises(RequestError, match="a run cannot be read"):
        open_source("run", tmp_path)


def test_a_plan_of_slices_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family(tmp_path, count=2)
    monkeypatch.setattr(OpenFiles, "stored", lambda *_: pytest.fail("a tensor was read"))
    assert len(planned(tmp_path, franken("a", "b")).tensors) == 4 * 9 + 3
    assert len(folder_tensors(tmp_path / "a")) == 3 * 9 + 3


def test_an_adapter_of_a_model_that_is_not_finite_is_not_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = family(tmp_path, count=0, dtype="F32")
    name = "model.layers.1.mlp.up_proj.weight"
    write_model(tmp_path / "broken", {**base, name: np.where(np.eye(24, 16) > 0, np.float32(np.nan), base[name])}, dtype="F32")
    assert run(["extract-lora", "broken", "--base", "base", "-o", "out"]) == 2
    assert f"{name}: holds NaN or infinite numbers in the tuned model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
