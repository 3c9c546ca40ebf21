"""What would become another model, or a traceback, is refused while planning: dtypes, rows of tokens, layers to reset, statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.merge_models import LLAMA, family, llama_shapes, merged, random_values, read_values, refused, write_model, write_tensors

from ftcli.errors import RecipeError
from ftcli.merging.methods.method import NoMean
from ftcli.merging.numbers import Array, from_float32
from ftcli.merging.stored import OpenFiles, folder_tensors

LINEAR = "merge_method: linear\nmodels: [a, b]\nparameters: {weight: 1}\n"
COPY = "merge_method: passthrough\nmodels: [a]\n"


def eight_bit(folder: Path, seed: int) -> None:
    """A model whose matrices in layers are stored as FP8: any bytes but those of NaN."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, value in random_values(llama_shapes(LLAMA), seed).items():
        is_small = "proj" in name
        tensors[name] = ("F8_E4M3", generator.integers(0, 0x70, value.shape).astype(np.uint8)) if is_small else ("F32", value)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    write_tensors(folder / "model.safetensors", tensors)


def stored_bytes(folder: Path, name: str) -> bytes:
    tensor = folder_tensors(folder)[name]
    with OpenFiles() as files:
        return files.stored(tensor, 0, tensor.size).tobytes()


@pytest.mark.parametrize("other", ["of the same kind", "in float32"])
def test_weights_that_cannot_be_computed_with_are_refused(other: str, tmp_path: Path) -> None:
    eight_bit(tmp_path / "a", 1)
    if other == "in float32":
        write_model(tmp_path / "b", random_values(llama_shapes(LLAMA), 2), dtype="F32")
    else:
        eight_bit(tmp_path / "b", 2)
    for recipe in (LINEAR, LINEAR.replace("[a, b]", "[b, a]"), LINEAR.replace("linear", "task_arithmetic") + "base_model: a\n"):
        text = refused(tmp_path, recipe)
        assert "its weights are stored as F8_E4M3, which cannot be merged: `model.layers.0." in text
        assert "save the model as bfloat16 or float32 first" in text
        assert len(text.splitlines()) < 8
    assert "F8_E4M3" in refused(tmp_path, COPY + "parameters: {scale: 0.5}\n")
    assert "F8_E4M3" in refused(tmp_path, COPY + "dtype: float16\n")


def test_weights_that_cannot_be_computed_with_are_copied_where_they_are_the_same(tmp_path: Path) -> None:
    eight_bit(tmp_path / "a", 1)
    eight_bit(tmp_path / "b", 1)
    name = "model.layers.1.mlp.up_proj.weight"
    for out in (merged(tmp_path, COPY, "copy"), merged(tmp_path, LINEAR, "same")):
        assert stored_bytes(out, name) == stored_bytes(tmp_path / "a", name)
        assert folder_tensors(out)[name].dtype == "F8_E4M3"


def test_buffers_of_whole_numbers_are_copied(tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b")):
        values = random_values(llama_shapes(LLAMA), number)
        tensors: dict[str, tuple[str, NDArray[Any]]] = {name: ("F32", value) for name, value in values.items()}
        tensors["model.layers.0.router.num_seen"] = ("I64", np.array([number + 7]))
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(LLAMA))
        write_tensors(tmp_path / folder / "model.safetensors", tensors)
    out = merged(tmp_path, LINEAR)
    assert stored_bytes(out, "model.layers.0.router.num_seen") == np.array([7]).tobytes()


METHODS = {
    "linear": LINEAR,
    "slerp": "merge_method: slerp\nbase_model: a\nmodels: [b]\nparameters: {t: 0.5}\n",
    "ties": "merge_method: ties\nbase_model: a\nmodels: [b]\nparameters: {weight: 1, density: 0.5, scope: global}\n",
    "passthrough": COPY,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
def test_a_tensor_without_numbers_stays_one(method: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    base = random_values(llama_shapes(LLAMA), 0)
    for folder in "ab":
        write_model(tmp_path / folder, {**base, "model.layers.0.self_attn.nothing": np.zeros(shape, np.float32)})
    out = merged(tmp_path, METHODS[method])
    assert folder_tensors(out)["model.layers.0.self_attn.nothing"].shape == shape


def with_tokens(folder: Path, values: Mapping[str, Array], tokens: list[str]) -> None:
    write_model(folder, values, {**LLAMA, "vocab_size": len(values["lm_head.weight"])}, dtype="F32")
    document = {"model": {"type": "WordLevel", "vocab": {token: row for row, token in enumerate(tokens)}, "unk_token": "0"}}
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{kind: model_token, model: a, token_id: -3}", "token_id (line 4, column 79): found `-3`, allowed: a whole number, at least 0"),
        ("{kind: model_token, model: a, token_id: [1]}", "allowed: a whole number, at least 0"),
        ("{kind: model_token, model: a, token_id: true}", "allowed: a whole number, at least 0"),
        ("{kind: model_token, model: a, token_id: 1.5}", "allowed: a whole number, at least 0"),
        ("{kind: model_token, model: a, token: 5}", "allowed: text"),
        ("{kind: model_token, model: a, token: '5', token_id: 5}", "not with one of `token` and `token_id`"),
        ("{kind: model_token, model: a}", "not with one of `token` and `token_id`"),
        ("5", "1 problem\n\n  tokenizer.tokens.<x>.source (line 4, column 41): found `5`, allowed: a mapping"),
        ("", "1 problem\n\n  tokenizer.tokens.<x>.source (line 4, column 41): found nothing (null), allowed: a mapping"),
        ("{kind: model_token, model: a, token_id: 40}", "found row 40, `a` has 40 rows: 0 to 39"),
        ("{kind: model_token, model: a, token_id: 99999}", "found row 99999, `a` has 40 rows: 0 to 39"),
        ("{kind: model_token, model: b, token: '40'}", "found row 40, `b` has 40 rows: 0 to 39"),
    ],
)
def test_a_row_that_a_model_has_not_is_refused(rule: str, message: str, tmp_path: Path) -> None:
    values = random_values(llama_shapes(LLAMA), 0)
    with_tokens(tmp_path / "a", values, [str(row) for row in range(40)])
    with_tokens(tmp_path / "b", values, [str(row) for row in range(41)])
    assert message in refused(tmp_path, LINEAR + f"tokenizer: {{source: a, tokens: {{'<x>': {{source: {rule}}}}}}}\n")


def test_a_row_by_its_number_is_that_row(tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        with_tokens(tmp_path / folder, random_values(llama_shapes(LLAMA), seed), [str(row) for row in range(40)])
    tokens = "{'<x>': {source: {kind: model_token, model: b, token_id: 39}, force: true}}"
    out = merged(tmp_path, LINEAR + f"tokenizer: {{source: a, tokens: {tokens}}}\n")
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(read_values(out)[name][40], read_values(tmp_path / "b")[name][39])


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("pad_to_multiple_of: 10000000000000", "allowed: a whole number from 1 to 65536"),
        ("pad_to_multiple_of: 0", "allowed: a whole number from 1 to 65536"),
        ("source: far", "the merged vocabulary would have 10000000000000 rows"),
    ],
)
def test_a_vocabulary_without_measure_is_refused(tokenizer: str, message: str, tmp_path: Path) -> None:
    values = random_values(llama_shapes(LLAMA), 0)
    for folder in ("a", "b", "far"):
        with_tokens(tmp_path / folder, values, [str(row) for row in range(40)])
    path = tmp_path / "far" / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {"0": 0, "far": 10**13 - 1}}}))
    assert message in refused(tmp_path, LINEAR + f"tokenizer: {{{tokenizer}}}\n")


def layer_values(folder: Path, layer: int) -> dict[str, Array]:
    start = f"model.layers.{layer}."
    return {name.removeprefix(start): value for name, value in read_values(folder).items() if name.startswith(start)}


RESET = "base_model: base\nreset: {fraction: 1.0, unit: tensor}\n"


@pytest.mark.parametrize(
    ("recipe", "origins"),
    [
        (
            "merge_method: passthrough\nslices:\n"
            "  - sources: [{model: a, layer_range: [2, 3]}]\n  - sources: [{model: a, layer_range: [0, 3]}]\n",
            [2, 0, 1, 2],
        ),
        ("merge_method: passthrough\ndus: {model: a, drop: 1}\n", [0, 1, 1, 2]),
        (
            "merge_method: slerp\nparameters: {t: 0.5}\nslices:\n"
            "  - sources: [{model: base, layer_range: [1, 3]}, {model: a, layer_range: [0, 2]}]\n",
            [1, 2],
        ),
    ],
    ids=["slices", "dus", "the slice names the base's layers"],
)
def test_a_reset_layer_is_the_bases_layer_that_it_was_made_from(recipe: str, origins: list[int], tmp_path: Path) -> None:
    family(tmp_path, count=1)
    out = merged(tmp_path, recipe + RESET)
    for layer, origin in enumerate(origins):
        own, expected = layer_values(out, layer), layer_values(tmp_path / "base", origin)
        assert [name for name in expected if own[name].tobytes() != expected[name].tobytes()] == []
    assert f"model.layers.{len(origins)}.mlp.up_proj.weight" not in read_values(out)


def test_a_reset_to_layers_that_nothing_names_is_refused(tmp_path: Path) -> None:
    family(tmp_path, count=0)
    config = {**LLAMA, "num_hidden_layers": 5}
    write_model(tmp_path / "deep", random_values(llama_shapes(config), 1), config)
    text = refused(tmp_path, "merge_method: passthrough\nmodels: [deep]\n" + RESET)
    assert "reset (line 4" in text
    assert "`deep` has 5 layers, the base 3" in text
    base = random_values(llama_shapes(LLAMA), 1)
    write_model(tmp_path / "more", {**base, "model.layers.1.self_attn.q_norm.weight": np.ones(4, np.float32)})
    assert "no tensor of that place" in refused(tmp_path, "merge_method: passthrough\nmodels: [more]\n" + RESET)


def test_too_much_dropped_is_said_once_by_its_key(tmp_path: Path) -> None:
    family(tmp_path, count=0)
    text = refused(tmp_path, "merge_method: passthrough\ndus: {model: base, drop: 3}\n")
    assert "1 problem" in text
    assert "dus.drop (line 2, column 20): found 3, `base` has 3 layers, allowed: fewer" in text


def statistics(folder: Path, name: str, value: float) -> None:
    tensors = {key: ("F32", from_float32(np.full(shape, value, np.float32), "F32")) for key, shape in llama_shapes(LLAMA).items()}
    write_tensors(folder / name, tensors)


def test_statistics_of_another_method_are_one_problem(tmp_path: Path) -> None:
    family(tmp_path, count=2)
    statistics(tmp_path, "s.safetensors", 1.0)
    models = "models: [{model: a, statistics: s.safetensors}, {model: b, statistics: s.safetensors}]\n"
    text = refused(tmp_path, f"merge_method: regmean\n{models}")
    assert "1 problem" in text
    assert "the statistics are not those that `regmean` needs" in text
    assert "`ftcli merge-statistics MODEL --kind regmean` gathers them" in text


def test_fisher_statistics_below_zero_are_refused_by_their_tensor(tmp_path: Path) -> None:
    family(tmp_path, count=2)
    statistics(tmp_path, "s.safetensors", 1.0)
    statistics(tmp_path, "n.safetensors", -1e-3)
    models = "models: [{model: a, statistics: s.safetensors}, {model: b, statistics: n.safetensors}]\n"
    with pytest.raises(NoMean, match="Fisher statistics have negative numbers"):
        merged(tmp_path, f"merge_method: fisher\n{models}")
    assert not (tmp_path / "out").exists()


def test_weights_that_cancel_are_said_as_they_are_written(tmp_path: Path) -> None:
    family(tmp_path, count=2)
    models = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -0.9999999}}]\n"
    assert "the weights 1, -0.9999999 sum to 1e-07" in refused(tmp_path, f"merge_method: linear\n{models}")


def test_adapters_are_not_trimmed_over_all_modules_together(tmp_path: Path) -> None:
    """They are merged one module at a time; said before any adapter is looked for."""
    from ftcli.merging.lora.recipe import read_adapter_recipe

    document = {"merge_method": "lora_ties", "models": ["nowhere"], "parameters": {"weight": 1, "density": 0.5, "scope": "global"}}
    with pytest.raises(RecipeError, match="1 problem") as caught:
        read_adapter_recipe(document, tmp_path)
    assert caught.value.problems[0].where == "parameters.scope"
    assert caught.value.problems[0].what == "found `global`, allowed: tensor"
