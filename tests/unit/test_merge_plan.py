"""What is wrong with a merge is said at once, with its line, before any weight is read."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.merge_models import LLAMA, family, llama_shapes, planned, random_values, read_values, refused, write_model, write_tensors

from ftcli.errors import RecipeError
from ftcli.merging.plan import plan_merge
from ftcli.merging.recipe import load_merge_recipe
from ftcli.merging.stored import OpenFiles
from ftcli.models.layer_lists import merged_layers

GOOD = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: 2}}\n"


SLERP = "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n"


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("", ["merge_method"]),
        (GOOD.replace("linear", "liner"), ["merge_method (line 1", "unknown method `liner`", "did you mean `linear`?"]),
        (GOOD.replace("weight: 2", "wieght: 2"), ["line 4", "unknown parameter", "did you mean `weight`?", "1 problem"]),
        (GOOD + "normalise: false\n", ["normalise (line 5", "unknown key"]),
        (GOOD + "parameters: {normalise: false}\n", ["parameters.normalise", "did you mean `normalize`?"]),
        (GOOD + "parameters: {density: 0.5}\n", ["unknown parameter", "`density` belongs to ties"]),
        (GOOD.replace("weight: 2", "normalize: false, weight: 2"), ["`normalize` is one for all models"]),
        (GOOD.replace("weight: 2", "weight: -1"), ["the weights 1, -1 sum to 0", "normalize: false"]),
        (GOOD.replace("weight: 2", "weight: much"), ["found `much`, allowed: a number"]),
        (GOOD.replace("weight: 2", "weight: [1, two]"), ["weight.1 (line 4", "found `two`"]),
        (GOOD.replace("weight: 2", "weight: {value: 1, regex: '['}"), ["no regular expression"]),
        (GOOD.replace("weight: 2", "weight: [{filter: mlp, value: 1}]"), ["`weight` has no value for `model.embed_tokens.weight`"]),
        (GOOD + "dtype: bfloat\n", ["dtype (line 5", "did you mean `bfloat16`?"]),
        (GOOD + "slices: []\n", ["`models` and `slices`, allowed: one of"]),
        (GOOD.replace("model: b", "model: nowhere"), ["models.1.model (line 4", "`nowhere`"]),
        (GOOD.replace("linear", "ties"), ["`ties` compares models with a base, and there is none"]),
        (GOOD.replace("linear", "slerp") + "base_model: base\nparameters: {t: 2}\n", ["from 0 to 1", "unknown parameter"]),
        (SLERP + "models: [a, b]\n", ["found 2 models besides the base, `slerp` takes 1"]),
        ("merge_method: fisher\nmodels: [a, b]\n", ["`fisher` needs statistics of every model"]),
        (GOOD + "chat_template: chatlm\n", ["unknown chat template `chatlm`", "did you mean `chatml`?"]),
        (GOOD + "tokenizer_source: union\n", ["it has no tokenizer.json"]),
        (GOOD + "tokenizer: {source: base, tokns: {}}\n", ["tokenizer.tokns", "did you mean `tokens`?"]),
        (
            "merge_method: passthrough\nslices:\n"
            "  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources: [{model: b, layer_range: [1, 9]}]\n",
            ["slices.1.sources.0.layer_range (line 4", "found layers 1 to 9, `b` has 3"],
        ),
        ("merge_method: linear\nslices:\n  - sources: [{model: a, layer_range: [2, 1]}]\n", ["allowed: [first, last]"]),
        (
            "merge_method: della\nbase_model: base\nmodels: [a]\nparameters: {weight: 1, density: 0.1}\n",
            ["density - epsilon must be above 0"],
        ),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_with_its_place(recipe: str, expected: list[str], tmp_path: Path) -> None:
    family(tmp_path, count=2)
    text = refused(tmp_path, recipe)
    assert [word for word in expected if word not in text] == [], text


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    text = refused(tmp_path, "merge_method: ties\nmodel: x\nmodels: [a]\nparameters: {densty: 1}\ndtype: int4\nseed: x\n")
    assert "5 problems" in text
    assert [int(line.split("(line ")[1].split(",")[0]) for line in text.splitlines() if "(line " in line] == [1, 2, 4, 5, 6]


def test_planning_reads_no_tensor_and_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**LLAMA, "num_hidden_layers": 64}
    family(tmp_path, count=2, config=config)
    monkeypatch.setattr(OpenFiles, "stored", lambda *_: pytest.fail("a tensor was read"))
    started = time.process_time()
    plan = planned(tmp_path, GOOD)
    assert time.process_time() - started < 1
    assert len(plan.tensors) == 64 * 9 + 3


def test_tensors_that_are_missing_left_over_or_of_another_shape_are_named(tmp_path: Path) -> None:
    base = family(tmp_path, count=1)
    write_model(tmp_path / "b", {name: value for name, value in base.items() if "layers.1.mlp.up" not in name})
    assert "tensor `model.layers.1.mlp.up_proj.weight` is not there" in refused(tmp_path, GOOD)
    extra = dict(base) | {"model.layers.0.self_attn.q_norm.weight": base["model.norm.weight"]}
    write_model(tmp_path / "extra", extra)
    assert "has tensors that others have not: `model.layers.0.self_attn.q_norm.weight`" in refused(tmp_path, GOOD.replace("b,", "extra,"))
    config = {**LLAMA, "intermediate_size": 32}
    write_model(tmp_path / "wide", random_values(llama_shapes(config), 1), config)
    assert "the shapes differ: `a` [24, 16], `wide` [32, 16]" in refused(tmp_path, GOOD.replace("b,", "wide,"))
    config = {**LLAMA, "num_hidden_layers": 2}
    write_model(tmp_path / "short", random_values(llama_shapes(config), 1), config)
    assert "different numbers of layers: `a` 3, `short` 2" in refused(tmp_path, GOOD.replace("b,", "short,"))
    config = {**LLAMA, "vocab_size": 44}
    write_model(tmp_path / "wordy", random_values(llama_shapes(config), 1), config)
    assert "vocabularies of different sizes" in refused(tmp_path, GOOD.replace("b,", "wordy,"))
    write_model(tmp_path / "quantised", base, {**LLAMA, "quantization_config": {"quant_method": "gptq"}})
    assert "its weights are quantised (gptq)" in refused(tmp_path, GOOD.replace("b,", "quantised,"))


def test_a_damaged_file_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family(tmp_path, count=2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    with pytest.raises(RecipeError, match="1000 B are free"):
        plan_merge(load_merge_recipe(path), tmp_path / "out")
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "it ends before" in refused(tmp_path, GOOD)


def test_a_filter_that_matches_nothing_is_a_warning(tmp_path: Path) -> None:
    family(tmp_path, count=2)
    plan = planned(tmp_path, GOOD.replace("weight: 2", "weight: [{filter: mpl, value: 1}, {value: 2}]"))
    assert ["`mpl` matches no tensor" in warning for warning in plan.warnings] == [True]


def test_a_head_that_only_one_model_has_is_merged_with_the_embedding_of_the_other(tmp_path: Path) -> None:
    family(tmp_path, count=1)
    config = {**LLAMA, "tie_word_embeddings": True}
    write_model(tmp_path / "b", random_values(llama_shapes(config), 5), config)
    plan = planned(tmp_path, GOOD)
    head = next(tensor for tensor in plan.tensors if tensor.name == "lm_head.weight")
    assert [item.name for item in head.inputs] == ["lm_head.weight", "model.embed_tokens.weight"]
    swapped = planned(tmp_path, GOOD.replace("model: a", "model: x").replace("model: b", "model: a").replace("model: x", "model: b"))
    assert swapped.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in {tensor.name for tensor in swapped.tensors}


def test_the_head_of_a_last_slice_that_ties_it_is_its_embedding(tmp_path: Path) -> None:
    family(tmp_path, count=1)
    config = {**LLAMA, "tie_word_embeddings": True}
    write_model(tmp_path / "b", random_values(llama_shapes(config), 5), config)
    first, last = "  - sources: [{model: a, layer_range: [0, 2]}]\n", "  - sources: [{model: b, layer_range: [1, 3]}]\n"
    plan = planned(tmp_path, f"merge_method: passthrough\nslices:\n{first}{last}")
    (head,) = (tensor for tensor in plan.tensors if tensor.name == "lm_head.weight")
    assert [(plan.sources[item.source].reference, item.name) for item in head.inputs] == [("b", "model.embed_tokens.weight")]
    assert plan.config["tie_word_embeddings"] is False


def test_layers_take_their_settings_with_them() -> None:
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "mlp_only_layers": [0, 3],
        "no_rope_layers": [1, 1, 1, 0],
        "first_k_dense_replace": 1,
        "eos_token_id": [1, 2, 3, 4],
        "sliding_window_pattern": 2,
    }
    merged, faults = merged_layers(config, [(config, layer) for layer in (0, 1, 2, 1, 2, 3)])
    assert faults == []
    assert merged["num_hidden_layers"] == 6
    assert merged["layer_types"] == [config["layer_types"][layer] for layer in (0, 1, 2, 1, 2, 3)]  # type: ignore[index]
    assert merged["mlp_only_layers"] == [0, 5]
    assert merged["no_rope_layers"] == [1, 1, 1, 1, 1, 0]
    assert merged["eos_token_id"] == [1, 2, 3, 4]
    assert "sliding_window_pattern" not in merged


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sliding_window_pattern": 2}, {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
        ({"model_type": "gemma2", "sliding_window": 8}, {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
        (
            {"use_sliding_window": True, "max_window_layers": 2},
            {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        ),
        ({"use_sliding_window": False, "max_window_layers": 4}, {"max_window_layers": 3}),
        ({"first_k_dense_replace": 1}, {"first_k_dense_replace": 1}),
    ],
)
def test_rules_for_layers_are_written_out(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    full = {"num_hidden_layers": 4, **config}
    merged, faults = merged_layers(full, [(full, layer) for layer in (0, 2, 3)])
    assert faults == []
    assert {key: merged[key] for key in expected} == expected


def test_a_rule_that_layers_would_break_is_a_fault() -> None:
    config = {"num_hidden_layers": 4, "decoder_sparse_step": 2}
    assert "every 2th layer" in merged_layers(config, [(config, layer) for layer in (0, 2, 3)])[1][0]
    assert merged_layers(config, [(config, layer) for layer in (0, 1, 2, 3, 2, 3)])[1] == []
    config = {"num_hidden_layers": 4, "first_k_dense_replace": 2}
    assert merged_layers(config, [(config, layer) for layer in (0, 3, 1)])[1] != []


def test_depth_up_scaling_is_the_model_without_its_ends_twice(tmp_path: Path) -> None:
    family(tmp_path, count=0)
    plan = planned(tmp_path, "merge_method: passthrough\ndus: {model: base, drop: 1}\n")
    origins = [tensor.inputs[0].name.split(".")[2] for tensor in plan.tensors if tensor.name.endswith("q_proj.weight")]
    assert origins == ["0", "1", "1", "2"]
    assert plan.config["num_hidden_layers"] == 4
    assert all(tensor.is_copy for tensor in plan.tensors)


def test_a_plan_for_programs_is_json(tmp_path: Path) -> None:
    from ftcli.merging.outcome import plan_json, plan_lines

    family(tmp_path, count=2)
    plan = planned(tmp_path, GOOD)
    report = json.loads(json.dumps(plan_json(plan)))
    assert report["tensors"][0]["settings"]["weight"] == [1, 2]
    assert any("model.layers.*.mlp.up_proj.weight (x3)" in line for line in plan_lines(plan))


def tied_family(folder: Path, **ties: bool | None) -> None:
    """Models with a stored head each: a copy of the embedding where the configuration ties it."""
    for seed, (name, tied) in enumerate(ties.items()):
        values = random_values(llama_shapes(LLAMA), seed)
        if tied:
            values["lm_head.weight"] = values["model.embed_tokens.weight"]
        write_model(folder / name, values, {**LLAMA, "tie_word_embeddings": tied}, dtype="F32")


@pytest.mark.parametrize(
    ("recipe", "ties", "expected"),
    [
        ("linear", {"a": True, "b": False}, False),
        ("linear", {"a": True, "b": True}, True),
        ("linear", {"a": False, "b": True}, False),
        ("dare_linear", {"a": True, "b": True}, False),
        ("by_name", {"a": True, "b": True}, False),
        ("slices", {"a": True, "b": False}, False),
        ("slices", {"a": True, "b": True}, False),
        ("reset", {"a": True, "b": True}, False),
        ("fisher", {"a": True, "b": True}, False),
    ],
)
def test_a_configuration_ties_a_stored_head_only_where_it_is_the_embedding(
    recipe: str, ties: dict[str, bool], expected: bool, tmp_path: Path
) -> None:
    """Judged by the tensors that are written, and by what transformers makes of them."""
    from transformers import AutoModelForCausalLM

    from ftcli.merging.outcome import merge_models

    tied_family(tmp_path, **ties)
    weight = "[{regex: lm_head, value: 0.2}, {value: 0.7}]" if recipe == "by_name" else "0.7"
    models = f"models:\n  - {{model: a, parameters: {{weight: 1}}}}\n  - {{model: b, parameters: {{weight: {weight}}}}}\n"
    sliced = "slices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources: [{model: b, layer_range: [2, 3]}]\n"
    text = {
        "slices": f"merge_method: passthrough\n{sliced}",
        "dare_linear": f"merge_method: dare_linear\nbase_model: a\n{models}parameters: {{density: 0.5}}\n",
        "fisher": "merge_method: fisher\nmodels: [{model: a, statistics: a.f}, {model: b, statistics: b.f}]\n",
        "reset": f"merge_method: linear\nbase_model: a\n{models}reset: {{fraction: 0.5, unit: tensor}}\nseed: 1\n",
    }.get(recipe, f"merge_method: linear\n{models}")
    embedding = "model.embed_tokens.weight"
    for seed, name in enumerate("ab"):  # of the embedding alone, as of a model whose head is no parameter of its own
        known = random_values({embedding: llama_shapes(LLAMA)[embedding]}, seed + 5)
        write_tensors(tmp_path / f"{name}.f", {embedding: ("F32", np.abs(known[embedding]))})
    (tmp_path / "r.yaml").write_text(text)
    outcome = merge_models(tmp_path / "r.yaml", tmp_path / "out", verify=False)
    values = read_values(tmp_path / "out")
    assert np.array_equal(values["lm_head.weight"], values["model.embed_tokens.weight"]) is expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is expected
    assert any("a head of its own" in warning for warning in outcome.warnings) is (ties["a"] and not expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert np.array_equal(loaded.get_output_embeddings().weight.detach().numpy(), values["lm_head.weight"])
