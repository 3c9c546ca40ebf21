"""Where the result of a merge is one of its inputs it is that input bit for bit; elsewhere the error is what the documentation says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.merge_models import LLAMA, llama_shapes, merged, random_values, read_values, write_model, write_tensors
from tests.unit.test_merge_methods import SHAPES, merge, quick, same_shape, values_for

from ftcli.errors import RecipeError
from ftcli.merging.methods.method import Parameter
from ftcli.merging.methods.registry import METHODS
from ftcli.merging.numbers import Array
from ftcli.merging.plan import plan_merge
from ftcli.merging.recipe import load_merge_recipe

ONE_LAYER = {**LLAMA, "num_hidden_layers": 1}
HALF_STEP = 2.0**-24
"""Relative error of one rounding to float32."""


def far_apart(seed: int, count: int, shape: tuple[int, ...] = (40, 30)) -> list[Array]:
    """Unrelated numbers of many magnitudes: what is left of base + (model - base) where the base is large."""
    generator = np.random.default_rng(seed)
    return [(generator.standard_normal(shape) * 2.0 ** generator.integers(-12, 12, shape)).astype(np.float32) for _ in range(count)]


WHOLE: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {},
    "dare_linear": {},
    "dare_ties": {},
    "della_linear": {},
    "della": {},
    "breadcrumbs": {},
    "breadcrumbs_ties": {},
    "sce": {},
    "ram": {"epsilon": 0.0},
    "ramplus_tl": {"epsilon": 0.0},
    "nearswap": {"t": 1e9},
    "wise_ft": {"alpha": 1.0},
    "slerp": {"t": 1.0},
}
"""Settings with which the merge of one model is that model."""


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_change_of_one_model_is_the_model_bit_for_bit(name: str) -> None:
    base, model = far_apart(0, 2)
    assert (base + (model - base) != model).mean() > 0.1  # what a sum of rounded numbers would give
    assert merge(name, [model], base, **WHOLE[name]).tobytes() == model.tobytes()


@pytest.mark.parametrize("name", ["ties", "dare_linear", "della", "breadcrumbs"])
def test_what_is_kept_of_one_model_is_the_models_and_the_rest_the_bases(name: str) -> None:
    base, model = far_apart(1, 2)
    found = merge(name, [model], base, density=0.5, epsilon=0.1, rescale=False)
    kept = found == model
    assert 0.3 < kept.mean() < 0.7
    assert np.array_equal(found, np.where(kept, model, base))


@quick
@given(st.integers(0, 2**16), st.integers(2, 5))
def test_the_error_of_a_sum_of_changes_is_what_the_documentation_says(seed: int, count: int) -> None:
    """At most half a step of the result, and n + 2 half steps of the weighted changes; against float64."""
    base, *models = far_apart(seed, count + 1, (6, 7))
    weights = np.random.default_rng(seed).uniform(-1, 1, count)
    found = merge("task_arithmetic", models, base, weight=tuple(weights.tolist()))
    terms = [weight * (model.astype(np.float64) - base) for weight, model in zip(weights, models, strict=True)]
    exact = base + np.sum(terms, axis=0)
    bound = HALF_STEP * (np.abs(exact) + (count + 2) * np.sum(np.abs(terms), axis=0)) * (1 + 1e-6)
    assert np.all(np.abs(found - exact) <= bound)


def slerp(a: Array, b: Array, t: float) -> Any:
    """The textbook's formula in float64; where one is zeros a straight line."""
    first, second = a.astype(np.float64), b.astype(np.float64)
    lengths = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    if not all(lengths):
        return (1 - t) * first + t * second
    angle = math.acos(min(1.0, max(-1.0, float((first * second).sum()) / (lengths[0] * lengths[1]))))
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def test_karcher_of_two_is_slerp_also_where_one_is_zeros() -> None:
    (b,) = far_apart(2, 1, (5, 6))
    zeros = np.zeros_like(b)
    for weights, models in (((0.7, 0.3), [zeros, b]), ((0.3, 0.7), [b, zeros])):
        np.testing.assert_allclose(merge("karcher", models, weight=weights), slerp(models[0], models[1], weights[1]), rtol=1e-6)
    # a bias that is nearly zeros is no cliff: what is written changes by as little in length
    noise = np.random.default_rng(3).standard_normal(b.shape).astype(np.float32) * np.float32(1e-7)
    near = merge("karcher", [noise, b], weight=(0.7, 0.3))
    assert np.linalg.norm(near) == pytest.approx(float(np.linalg.norm(merge("karcher", [zeros, b], weight=(0.7, 0.3)))), rel=1e-5)


def test_the_length_of_a_karcher_mean_counts_models_of_zeros() -> None:
    a, b = np.random.default_rng(4).standard_normal((2, 30)).astype(np.float32) + 1
    lengths = [float(np.linalg.norm(model)) for model in (a, b)]
    found = merge("karcher", [a, np.zeros_like(a), b], weight=(0.2, 0.5, 0.3))
    direction = slerp(a / lengths[0], b / lengths[1], 0.6)
    np.testing.assert_allclose(found, direction * (0.2 * lengths[0] + 0.3 * lengths[1]), rtol=2e-6)
    zeros = [np.zeros_like(a)] * 2
    assert not merge("karcher", zeros, weight=(0.2, 0.8)).any()


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (1,), ()])
def test_a_vector_is_one_arc_however_matrices_are_cut(shape: tuple[int, ...], by_column: bool) -> None:
    """With signs that differ, which no arc between single numbers could join."""
    base, a, b = np.random.default_rng(5).standard_normal((3, *shape)).astype(np.float32)
    a, b = (np.abs(a), np.abs(b)) if a.size == 1 else (a, b)
    options: dict[str, Any] = {"weight": (0.6, 0.4), "nuslerp_flatten": False, "nuslerp_row_wise": by_column}
    if a.size > 1:
        np.testing.assert_allclose(merge("nuslerp", [a, b], **options), slerp(a, b, 0.4), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(merge("nuslerp", [a, b], base, **options), base + slerp(a - base, b - base, 0.4), rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_allclose(merge("nuslerp", [a, b], **options), 0.6 * a + 0.4 * b, rtol=1e-6)


MEANS: dict[str, str] = {
    "linear": "{weight: 0.4}, {weight: 0.3}, {weight: 0.3}",
    "linear 30": ", ".join(["{weight: 1}"] * 30),
    "linear as it is": "{weight: 0.7}, {weight: 0.2}, {weight: 0.1}",
    "karcher": "{weight: 0.4}, {weight: 0.3}, {weight: 0.3}",
    "multislerp": "{weight: 0.4}, {weight: 0.3}, {weight: 0.3}",
    "nuslerp": "{weight: 0.4}, {weight: 0.3}",
    "nuslerp of changes": "{weight: 0.4}, {weight: 0.3}",
    "model_stock": "{}, {}, {}",
    "sce": "{}, {}",
    "fisher": "{weight: 0.4}, {weight: 0.3}, {weight: 0.3}",
    "regmean": "{weight: 0.4}, {weight: 0.3}, {weight: 0.3}",
}


@pytest.mark.parametrize("case", MEANS)
def test_tensors_in_which_all_models_are_equal_are_their_bits(case: str, tmp_path: Path) -> None:
    """Attention is what they have in common; one more model counts nothing and differs everywhere."""
    name, _, how = case.partition(" ")
    shapes = llama_shapes(ONE_LAYER)
    common, statistics = random_values(shapes, 0), random_values(shapes, 9)
    known = {key: value for key, value in statistics.items() if value.ndim == 2 and "q_proj" not in key}  # what has none is averaged
    grams = {key: (value.T @ value if name == "regmean" else np.abs(value)) for key, value in known.items()}
    write_tensors(tmp_path / "s.safetensors", {key: ("F32", np.ascontiguousarray(value)) for key, value in grams.items()})
    write_model(tmp_path / "base", random_values(shapes, 20), ONE_LAYER, dtype="F32")
    settings = MEANS[case].split(", {")
    entries = []
    for number, setting in enumerate(settings):
        own = {key: common[key] if "attn" in key else value for key, value in random_values(shapes, number + 1).items()}
        if number < 4:
            write_model(tmp_path / f"m{number}", own, ONE_LAYER, dtype="F32")
        extra = ", statistics: s.safetensors" if METHODS[name].statistics else ""
        entries.append(f"  - {{model: m{number % 4}, parameters: {{{setting.strip('{}')}}}{extra}}}\n")
    recipe = f"merge_method: {name}\nmodels:\n{''.join(entries)}"
    recipe += "base_model: base\n" if METHODS[name].base == "required" or how == "of changes" else ""
    recipe += "parameters: {normalize: false}\n" if how == "as it is" else ""
    found = read_values(merged(tmp_path, recipe))
    for key, value in common.items():
        assert (found[key].tobytes() == value.tobytes()) is ("attn" in key), key


def test_a_model_that_counts_nothing_does_not_count(tmp_path: Path) -> None:
    shapes = llama_shapes(ONE_LAYER)
    base, odd, common = (random_values(shapes, seed) for seed in range(3))
    for name, values in (("base", base), ("odd", odd), ("a", common), ("b", common)):
        write_model(tmp_path / name, values, ONE_LAYER, dtype="F32")
    models = "models:\n  - {model: odd, parameters: {weight: 0}}\n  - {model: a, parameters: {weight: 0.3}}\n"
    models += "  - {model: b, parameters: {weight: 0.6}}\n"
    for name in ("linear", "karcher", "multislerp"):
        found = read_values(merged(tmp_path, f"merge_method: {name}\n{models}", name))
        assert all(found[key].tobytes() == value.tobytes() for key, value in common.items())


def test_equal_models_are_no_mean_where_weights_do_not_sum_to_one(tmp_path: Path) -> None:
    shapes = llama_shapes(ONE_LAYER)
    common = random_values(shapes, 0)
    for name in "ab":
        write_model(tmp_path / name, common, ONE_LAYER, dtype="F32")
    recipe = "merge_method: {}\nmodels: [a, b]\nparameters: {{weight: 1, {}: false}}\n"
    for name, key in (("linear", "normalize"), ("multislerp", "normalize_weights")):
        found = read_values(merged(tmp_path, recipe.format(name, key), name))
        for key, value in common.items():
            np.testing.assert_allclose(found[key], 2 * value, rtol=1e-5)


def test_a_wide_tensor_of_few_rows_is_trimmed_like_any_other(tmp_path: Path) -> None:
    """Of 2 rows no sample can be taken; against a sort."""
    shapes = llama_shapes(ONE_LAYER) | {"model.extra.weight": (2, 2**18), "model.vector.weight": (2**19,)}
    base = random_values(shapes, 0)
    model = random_values(shapes, 1, base, 0.1)
    for name, values in (("base", base), ("a", model)):
        write_model(tmp_path / name, values, ONE_LAYER, dtype="F32")
    recipe = "merge_method: ties\nbase_model: base\nmodels: [a]\nparameters: {weight: 1, density: 0.25}\n"
    found = read_values(merged(tmp_path, recipe))
    for key in ("model.extra.weight", "model.vector.weight"):
        sizes = np.abs(model[key] - base[key]).reshape(-1)
        kept = np.sort(sizes)[-sizes.size // 4]
        expected = np.where(sizes >= kept, model[key].reshape(-1), base[key].reshape(-1))
        assert np.array_equal(found[key].reshape(-1), expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("linear", {"normalize": False}), ("multislerp", {"normalize_weights": False})],
)
def test_weights_that_float32_has_not_are_a_fault_where_they_are_used_as_they_are(name: str, settings: dict[str, Any]) -> None:
    fault = METHODS[name].fault(values_for(name, 2, weight=(1e-60, 1e-50), **settings))
    assert fault == "the weights 1e-60, 1e-50 are 0 in float32: the tensor would be zeros"
    assert METHODS[name].fault(values_for(name, 2, weight=(1e-60, 1e-30), **settings)) is None
    assert METHODS[name].fault(values_for(name, 2, weight=(1e-60, 1e-50))) is None


@quick
@given(same_shape(2), st.sampled_from([1e-60, 1e-7, 1e7]))
def test_only_the_ratio_of_weights_counts_in_a_mean(models: list[Array], factor: float) -> None:
    for name in ("linear", "task_arithmetic"):
        assert METHODS[name].fault(values_for(name, 2, weight=(factor, 3 * factor), normalize=True)) is None
    expected = merge("linear", models, weight=(0.25, 0.75))
    np.testing.assert_allclose(merge("linear", models, weight=(factor, 3 * factor)), expected, rtol=1e-6, atol=1e-6)
    for weights in ((factor, -factor), (factor, -factor * (1 + 1e-8)), (0.0, 0.0)):
        assert METHODS["task_arithmetic"].fault(values_for("task_arithmetic", 2, weight=weights, normalize=True)) is not None


def test_numbers_are_taken_for_true_and_false(tmp_path: Path) -> None:
    write_model(tmp_path / "base", random_values(llama_shapes(ONE_LAYER), 0), ONE_LAYER)
    write_model(tmp_path / "a", random_values(llama_shapes(ONE_LAYER), 1), ONE_LAYER)
    recipe = "merge_method: dare_ties\nbase_model: base\nmodels: [a]\nparameters: {weight: 1, int8_mask: 1.0, normalize: 0, rescale: 1}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    settings = plan_merge(load_merge_recipe(tmp_path / "r.yaml")).tensors[0].settings
    assert [settings[name] for name in ("int8_mask", "normalize", "rescale")] == [True, False, True]
    assert all(isinstance(settings[name], bool) for name in ("int8_mask", "normalize", "rescale"))
    (tmp_path / "r.yaml").write_text(recipe.replace("normalize: 0", "normalize: 0.5"))
    with pytest.raises(RecipeError, match=r"found `0\.5`, allowed: true or false"):
        load_merge_recipe(tmp_path / "r.yaml")
    assert Parameter("filter_wise", False, "", "boolean").fault(2) is not None
    assert Parameter("rescale", False, "", "choice", choices=(True, False, "l1")).fault(0.5) is not None


def test_a_dtype_that_is_only_computed_with_is_said_to_have_no_effect(tmp_path: Path) -> None:
    for name in "ab":
        write_model(tmp_path / name, random_values(llama_shapes(ONE_LAYER), 0), ONE_LAYER)
    recipe = "merge_method: linear\nmodels: [a, b]\nparameters: {weight: 1}\n"
    for more, count in (("dtype: float64\n", 1), ("", 0), ("dtype: float64\nout_dtype: float32\n", 0), ("dtype: float32\n", 0)):
        (tmp_path / "r.yaml").write_text(recipe + more)
        warnings = plan_merge(load_merge_recipe(tmp_path / "r.yaml")).warnings
        assert [warning.startswith("`dtype: float64`: tensors are computed in float32") for warning in warnings] == [True] * count


@quick
@given(SHAPES, st.integers(0, 2**16))
def test_a_mean_of_equal_models_is_that_model_to_some_steps_wherever_it_is_computed(shape: tuple[int, ...], seed: int) -> None:
    """The functions themselves, which a search calls: 4 steps of the largest number cover 3 products and their sum."""
    (model,) = far_apart(seed, 1, shape)
    for name in ("linear", "karcher", "multislerp", "nuslerp"):
        found = merge(name, [model] * (2 if name == "nuslerp" else 3), weight=(0.4, 0.3, 0.3)[: 2 if name == "nuslerp" else 3])
        np.testing.assert_allclose(found, model, rtol=8 * HALF_STEP)
