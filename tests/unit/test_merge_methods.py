"""Merge methods satisfy their identities, on tensors of every awkward shape and kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ftcli.errors import RunError
from ftcli.merging.methods.method import REQUIRED
from ftcli.merging.methods.registry import METHODS
from ftcli.merging.methods.task_vectors import della_fault
from ftcli.merging.numbers import Array, fits, from_float32, to_float32
from ftcli.merging.pieces import ArrayInputs, sampled_rows
from ftcli.merging.randomness import Chances, Randomness

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SHAPES = st.sampled_from([(), (1,), (5,), (7, 1), (1, 6), (4, 8), (3, 2, 4)])
BASE_METHODS = [name for name, method in METHODS.items() if method.base == "required"]
NAMES = [name for name, method in METHODS.items() if method.statistics is None]


def values_for(name: str, num: int, **given_values: Any) -> dict[str, Any]:
    """Settings of a method with defaults; single values are given to every model."""
    found = {}
    for parameter in METHODS[name].parameters:
        value = given_values.get(parameter.name.replace("lambda", "lambda_"), parameter.default)
        if value is REQUIRED:
            value = 1.0 if parameter.name == "weight" else 0.5
        found[parameter.name] = (tuple(value) if isinstance(value, Sequence) else (value,) * num) if parameter.per_model else value
    return found


def merge(
    name: str,
    models: Sequence[Array],
    base: Array | None = None,
    *,
    seed: int = 0,
    piece: int = 2**19,
    statistics: Any = (),
    **given_values: Any,
) -> Array:
    """The merged array, through the same pieces as a merge of files."""
    labels = tuple(f"model {index}" for index in range(len(models)))
    inputs = ArrayInputs(models, base, Randomness(seed, "a.tensor", labels), statistics, piece_elements=piece)
    function = METHODS[name].merge(inputs, values_for(name, len(models), **given_values))
    return np.concatenate([function(part).reshape(-1) for part in inputs.pieces()]).reshape(np.shape(models[0]))


def stored_as(array: Array, dtype: str) -> Array:
    """What the array is once it was stored as bfloat16 or float16."""
    return to_float32(from_float32(array, dtype), dtype)


def arrays(shape: tuple[int, ...]) -> st.SearchStrategy[Array]:
    """float32 arrays on the grids of the dtypes that models come in, with zeros and equal values among them."""
    numbers = hnp.arrays(np.float32, shape, elements=st.floats(-4, 4, width=16))
    return st.builds(stored_as, numbers, st.sampled_from(["F32", "F16", "BF16"]))


@st.composite
def same_shape(draw: st.DrawFn, count: int) -> list[Array]:
    shape = draw(SHAPES)
    return [draw(arrays(shape)) for _ in range(count)]


def num_models(name: str) -> int:
    fewest, most = METHODS[name].num_models
    return max(fewest, min(3, most or 3))


def close(first: Array, second: Array, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(first, second, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@quick
@given(data=st.data())
def test_equal_inputs_give_the_input(name: str, data: st.DataObject) -> None:
    (model,) = data.draw(same_shape(1))
    num = num_models(name)
    base = None if METHODS[name].base != "required" else model
    close(merge(name, [model] * num, base, density=0.5, epsilon=0.1 if "della" in name else 1e-5), model)


@pytest.mark.parametrize("name", NAMES)
@quick
@given(data=st.data())
def test_finite_inputs_give_finite_outputs(name: str, data: st.DataObject) -> None:
    models = data.draw(same_shape(num_models(name)))
    base = data.draw(arrays(models[0].shape)) if METHODS[name].base == "required" else None
    try:
        merged = merge(name, models, base, density=0.5, epsilon=0.1 if "della" in name else 1e-5)
    except RunError:
        assert METHODS[name].merge.__module__.endswith("spherical")  # opposite directions have no mean
        return
    assert merged.dtype == np.float32
    assert np.isfinite(merged).all()


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].is_symmetric and METHODS[name].num_models[1] is None])
@quick
@given(data=st.data())
def test_the_order_of_the_models_means_nothing(name: str, data: st.DataObject) -> None:
    if name.startswith(("dare", "della")):
        return  # the bits of a model follow its name, which a permutation of arrays does not move
    models = data.draw(same_shape(3))
    base = data.draw(arrays(models[0].shape)) if METHODS[name].base == "required" else None
    weights = (0.5, 0.2, 0.3)
    try:
        first = merge(name, models, base, weight=weights, density=0.7)
        second = merge(name, models[::-1], base, weight=weights[::-1], density=0.7)
    except RunError:
        return
    close(first, second, 2e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "passthrough"])
def test_the_result_does_not_depend_on_the_pieces(name: str) -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(size=(40, 16)).astype(np.float32)
    models = [base + generator.normal(size=base.shape).astype(np.float32) * 0.1 for _ in range(num_models(name))]
    used_base = base if METHODS[name].base == "required" else None
    options: dict[str, Any] = {"density": 0.4, "epsilon": 0.1 if "della" in name else 1e-5}
    whole, cut = (merge(name, models, used_base, piece=size, **options) for size in (2**19, 48))
    np.testing.assert_allclose(whole, cut, rtol=2e-6, atol=2e-6)
    if name not in ("slerp", "nuslerp", "karcher", "multislerp", "model_stock", "sce"):  # their float64 sums are over pieces
        assert whole.tobytes() == cut.tobytes()


@pytest.mark.parametrize("name", BASE_METHODS)
@quick
@given(data=st.data())
def test_copies_of_the_base_change_nothing(name: str, data: st.DataObject) -> None:
    (base,) = data.draw(same_shape(1))
    merged = merge(name, [base.copy() for _ in range(num_models(name))], base, weight=0.3, density=0.5, epsilon=0.1)
    close(merged, base, 0 if name != "slerp" else 1e-6)


@quick
@given(same_shape(2))
def test_linear_with_one_weight_is_that_model_bit_for_bit(models: list[Array]) -> None:
    assert merge("linear", models, weight=(1.0, 0.0)).tobytes() == models[0].tobytes()


@quick
@given(same_shape(3))
def test_linear_nests_and_scales(models: list[Array]) -> None:
    a, b, c = models
    close(merge("linear", [merge("linear", [a, b]), c], weight=(2.0, 1.0)), merge("linear", models))
    close(merge("linear", models, weight=(3.0, 3.0, 6.0)), merge("linear", models, weight=(0.25, 0.25, 0.5)))


def test_weights_that_cancel_are_a_fault() -> None:
    fault = METHODS["linear"].fault(values_for("linear", 2, weight=(1.0, -1.0)))
    assert fault is not None
    assert "sum to 0" in fault
    assert METHODS["linear"].fault(values_for("linear", 2, weight=(1.0, -1.0), normalize=False)) is None


@quick
@given(same_shape(2))
def test_wise_ft_has_exact_ends_and_a_symmetric_middle(models: list[Array]) -> None:
    base, model = models
    assert merge("wise_ft", [model], base, alpha=0.0).tobytes() == base.tobytes()
    assert merge("wise_ft", [model], base, alpha=1.0).tobytes() == model.tobytes()
    close(merge("wise_ft", [model], base, alpha=0.5), merge("wise_ft", [base], model, alpha=0.5))


def apart(models: list[Array]) -> bool:
    """Neither opposite nor one of them zero."""
    a, b = (model.astype(np.float64).reshape(-1) for model in models)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return bool(norms > 1e-3 and a @ b / norms > -0.999)


@quick
@given(same_shape(2), st.floats(0.05, 0.95))
def test_slerp_has_exact_ends_and_is_symmetric(models: list[Array], t: float) -> None:
    a, b = models
    assert merge("slerp", [b], a, t=0.0).tobytes() == a.tobytes()
    assert merge("slerp", [b], a, t=1.0).tobytes() == b.tobytes()
    if apart(models):
        close(merge("slerp", [b], a, t=t), merge("slerp", [a], b, t=1 - t), 1e-4)
        close(merge("slerp", [b * 2], a * 2, t=t), 2 * merge("slerp", [b], a, t=t), 1e-4)


@quick
@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.integers(0, 99))
def test_slerp_keeps_the_length_and_composes(t: float, s: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = (vector / np.linalg.norm(vector) for vector in generator.normal(size=(2, 30)).astype(np.float32))
    middle = merge("slerp", [b], a, t=t)
    assert np.linalg.norm(middle) == pytest.approx(1, abs=1e-5)
    close(merge("slerp", [middle], a, t=s), merge("slerp", [b], a, t=s * t), 1e-4)


def test_slerp_is_continuous_where_the_arc_becomes_its_chord() -> None:
    a = np.array([1.0, 0.0, 0.0], np.float32)
    for angle in (1e-9, 1e-7, 1e-5, 1e-3):
        b = np.array([math.cos(angle), math.sin(angle), 0.0], np.float32)
        close(merge("slerp", [b], a, t=0.25), np.array([math.cos(angle / 4), math.sin(angle / 4), 0], np.float32), 1e-6)


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "karcher", "multislerp"])
def test_opposite_models_are_refused_and_not_turned_into_zeros(name: str) -> None:
    a = np.arange(1, 5, dtype=np.float32)
    models, base = ([-a], a) if name == "slerp" else ([a, -a], None)
    with pytest.raises(RunError, match=r"opposite|cancel"):
        merge(name, models, base, t=0.5)


@quick
@given(same_shape(2), st.floats(0.1, 0.9))
def test_nuslerp_is_slerp_and_karcher_of_two_is_slerp(models: list[Array], t: float) -> None:
    if not apart(models):
        return
    expected = merge("slerp", [models[1]], models[0], t=t)
    close(merge("nuslerp", models, weight=(1 - t, t)), expected, 1e-4)
    lengths = [float(np.linalg.norm(model)) for model in models]
    units = [model / length for model, length in zip(models, lengths, strict=True)]
    on_sphere = merge("slerp", [units[1]], units[0], t=t)
    close(merge("karcher", models, weight=(1 - t, t)), on_sphere * np.float32((1 - t) * lengths[0] + t * lengths[1]), 2e-4)


def test_nuslerp_on_changes_by_row_and_by_column() -> None:
    generator = np.random.default_rng(0)
    base, a, b = generator.normal(size=(3, 4, 6)).astype(np.float32)
    whole = merge("nuslerp", [a, b], base, weight=(0.7, 0.3))
    close(whole, base + merge("slerp", [b - base], a - base, t=0.3))
    rows = merge("nuslerp", [a, b], weight=(0.7, 0.3), nuslerp_flatten=False)
    close(rows, np.stack([merge("slerp", [b[i]], a[i], t=0.3) for i in range(4)]))
    columns = merge("nuslerp", [a, b], weight=(0.7, 0.3), nuslerp_flatten=False, nuslerp_row_wise=True)
    close(columns, np.stack([merge("slerp", [b[:, i]], a[:, i], t=0.3) for i in range(6)], axis=1))


def test_the_karcher_mean_is_stationary() -> None:
    generator = np.random.default_rng(3)
    models = list(generator.normal(size=(4, 50)).astype(np.float32) + 1)
    weights = (0.1, 0.2, 0.3, 0.4)
    mean = merge("karcher", models, weight=weights).astype(np.float64)
    lengths = [np.linalg.norm(model) for model in models]
    assert np.linalg.norm(mean) == pytest.approx(float(np.dot(weights, lengths)), rel=1e-5)
    unit = mean / np.linalg.norm(mean)
    tangent = np.zeros_like(unit)
    for model, weight in zip(models, weights, strict=True):
        other = model / np.linalg.norm(model)
        angle = math.acos(float(unit @ other))
        tangent += weight * angle / math.sin(angle) * (other - unit * (unit @ other))
    assert np.linalg.norm(tangent) < 1e-5


def test_multislerp_is_mergekits_closed_form() -> None:
    generator = np.random.default_rng(4)
    models = list(generator.normal(size=(3, 40)).astype(np.float32) + 0.5)
    weights = np.array([0.5, 0.3, 0.2])
    lengths = np.array([np.linalg.norm(model) for model in models])
    direction = sum(weight * model / length for weight, model, length in zip(weights, models, lengths, strict=True))
    close(merge("multislerp", models, weight=tuple(weights)), direction / np.linalg.norm(direction) * (weights @ lengths))


@quick
@given(same_shape(3))
def test_task_arithmetic_is_linear_in_its_weights(tensors: list[Array]) -> None:
    base, a, b = tensors
    assert merge("task_arithmetic", [a], base, weight=1.0).tobytes() == a.tobytes()
    assert np.array_equal(merge("task_arithmetic", [a], base, lambda_=0.0), base)
    close(merge("task_arithmetic", [a, b], base, weight=(0.3, 0.7)), merge("linear", [a, b], weight=(0.3, 0.7)))
    close(merge("task_arithmetic", [a, b], base, weight=(0.4, -0.9)) + merge("task_arithmetic", [a, b], base, weight=(-0.4, 0.9)), 2 * base)


@quick
@given(same_shape(2), st.floats(0.0, 1.0))
def test_ties_keeps_exactly_so_many(tensors: list[Array], density: float) -> None:
    base, model = tensors
    delta = (model - base).reshape(-1)
    change = (merge("ties", [model], np.zeros_like(base), density=density)).reshape(-1)
    thin = merge("ties", [delta.reshape(base.shape)], np.zeros_like(base), density=density).reshape(-1)
    count = 0 if density == 0 else max(1, min(delta.size, int(density * delta.size)))
    ranked = sorted(range(delta.size), key=lambda index: (-abs(delta[index]), index))
    expected = np.zeros_like(delta)
    expected[ranked[:count]] = delta[ranked[:count]]
    assert np.array_equal(thin, expected)
    assert change.shape == thin.shape


@quick
@given(same_shape(3))
def test_ties_of_one_sign_is_a_mean_and_of_one_model_the_model(tensors: list[Array]) -> None:
    base, a, b = tensors
    assert merge("ties", [a], base).tobytes() == a.tobytes()
    close(merge("ties", [a, a, a], base, density=0.6), merge("ties", [a], base, density=0.6))
    up = [base + np.abs(a) + 1, base + np.abs(b) + 1]
    close(merge("ties", up, base, weight=(0.3, 0.7)), merge("linear", up, weight=(0.3, 0.7)))


@quick
@given(same_shape(3))
def test_ties_elects_one_sign_and_stays_within_those_that_agree(models: list[Array]) -> None:
    zero = np.zeros_like(models[0])
    weights = (0.5, 0.3, 0.2)
    merged = merge("ties", models, zero, weight=weights)
    sign = np.sign(sum(np.float32(weight) * model for weight, model in zip(weights, models, strict=True)))
    assert np.all((np.sign(merged) == sign) | (merged == 0) | (np.abs(merged) < 1e-6))
    assert np.all(np.abs(merged) <= np.max(np.abs(models), axis=0) + 1e-6)


def test_ties_elections_by_weight_by_sum_and_by_count() -> None:
    models = [np.array([3.0], np.float32), np.array([-1.0], np.float32), np.array([-1.0], np.float32)]
    zero = np.zeros(1, np.float32)
    assert merge("ties", models, zero, weight=(1, 1, 1), elect="sum")[0] == 3
    assert merge("ties", models, zero, weight=(1, 1, 1), elect="count")[0] == -1
    assert merge("ties", models, zero, weight=(0.5, 1, 1), elect="weighted")[0] == -1
    assert merge("ties", models, zero, weight=(0.5, 1, 1), elect="sum")[0] == 3
    halves = [np.array([2.0], np.float32)] * 2
    assert merge("ties", halves, zero, weight=(0.5, 0.5), divide="count")[0] == 1  # PEFT's: half the result
    assert merge("ties", halves, zero, weight=(0.5, 0.5))[0] == 2


def test_negative_weights_do_not_blow_up_ties() -> None:
    models = [np.array([1.0], np.float32), np.array([-1.0], np.float32)]
    merged = merge("ties", models, np.zeros(1, np.float32), weight=(1.0, -0.999999))
    assert abs(merged[0]) <= 1.000001


def test_a_draw_changes_nothing() -> None:
    base = np.array([5.0], np.float32)
    assert merge("ties", [base + 1, base - 1], base)[0] == 5


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_dropping_is_unbiased_and_survivors_are_divided_by_their_probability(name: str) -> None:
    delta = np.linspace(0.5, 1.5, 8, dtype=np.float32)
    base = np.zeros(8, np.float32)
    epsilon = 0.2
    draws = np.stack([merge(name, [delta], base, seed=seed, density=0.4, epsilon=epsilon, normalize=False) for seed in range(1500)])
    probabilities = np.full(8, 0.4) if name.startswith("dare") else 0.4 + np.linspace(-epsilon, epsilon, 8)
    survivors = np.broadcast_to(delta / probabilities, draws.shape)
    np.testing.assert_allclose(draws[draws != 0], survivors[draws != 0], rtol=1e-5)
    error = delta * np.sqrt((1 - probabilities) / probabilities / 1500)
    assert np.all(np.abs(draws.mean(axis=0) - delta) < 5 * error)


def test_density_one_keeps_everything_and_the_seed_decides() -> None:
    generator = np.random.default_rng(0)
    base, model = generator.normal(size=(2, 20, 10)).astype(np.float32)
    for name in ("dare_linear", "della_linear", "breadcrumbs", "ties"):
        assert merge(name, [model], base, density=1.0).tobytes() == model.tobytes()
    first, again, other = (merge("dare_linear", [model], base, density=0.5, seed=seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_della_probabilities_grow_with_magnitude_and_without_range_it_is_dare() -> None:
    generator = np.random.default_rng(0)
    delta = generator.normal(size=(400, 50)).astype(np.float32)
    base = np.zeros_like(delta)
    kept_by_rank = np.take_along_axis(
        merge("della_linear", [delta], base, density=0.5, epsilon=0.4) != 0, np.argsort(np.abs(delta), axis=1), axis=1
    )
    share = kept_by_rank.mean(axis=0)
    assert share[:10].mean() < 0.25 < 0.75 < share[-10:].mean()
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    close(merge("della_linear", [delta], base, density=0.5, epsilon=0.0), merge("dare_linear", [delta], base, density=0.5))


def test_della_refuses_probabilities_that_are_none() -> None:
    assert della_fault(values_for("della", 1, density=0.1, epsilon=0.15)) is not None
    assert della_fault(values_for("della", 1, density=0.9, epsilon=0.15)) is not None
    assert della_fault(values_for("della", 1, density=1.0, epsilon=0.15)) is None


def test_l1_rescaling_brings_back_the_sum_of_magnitudes() -> None:
    generator = np.random.default_rng(0)
    delta = generator.normal(size=(30, 30)).astype(np.float32)
    base = np.zeros_like(delta)
    for name in ("dare_linear", "ties", "della_linear", "breadcrumbs"):
        merged = merge(name, [delta], base, density=0.3, epsilon=0.1, rescale="l1")
        assert np.abs(merged).sum() == pytest.approx(float(np.abs(delta).sum()), rel=1e-4)


@quick
@given(same_shape(1), st.floats(0.05, 0.95), st.floats(0.0, 0.5))
def test_breadcrumbs_keeps_the_middle(tensors: list[Array], density: float, gamma: float) -> None:
    delta = tensors[0].reshape(-1)
    merged = merge("breadcrumbs", [delta], np.zeros_like(delta), density=density, gamma=gamma)
    count = max(1, int(density * delta.size))
    dropped = min(int(gamma * delta.size), delta.size - count)
    ranked = sorted(range(delta.size), key=lambda index: (-abs(delta[index]), index))[dropped : dropped + count]
    expected = np.zeros_like(delta)
    expected[ranked] = delta[ranked]
    assert np.array_equal(merged, expected)
    if gamma == 0:
        assert np.array_equal(merged, merge("ties", [delta], np.zeros_like(delta), density=density))


@quick
@given(same_shape(3))
def test_sce_of_one_or_of_equal_models_is_the_model(tensors: list[Array]) -> None:
    base, a, b = tensors
    assert merge("sce", [a], base, select_topk=0.4).tobytes() == a.tobytes()
    close(merge("sce", [a, a], base, select_topk=0.4), a)
    zero = np.zeros_like(base)
    close(merge("sce", [a * 2, b * 2], zero, select_topk=0.6), 2 * merge("sce", [a, b], zero, select_topk=0.6))


def test_model_stock_follows_the_angle_whatever_the_length() -> None:
    base = np.zeros(2, np.float32)
    along, across = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)
    for size in (1.0, 1e-4, 1e-8):
        scale = np.float32(size)
        np.testing.assert_allclose(merge("model_stock", [along * scale, along * scale], base), along * scale, rtol=1e-6)
        np.testing.assert_allclose(merge("model_stock", [along * scale, across * scale], base), base, atol=1e-12)
        half = np.array([0.5, math.sqrt(0.75)], np.float32)
        merged = merge("model_stock", [along * scale, half * scale], base)
        np.testing.assert_allclose(merged, (2 * 0.5 / 1.5) * (along + half) / 2 * scale, rtol=1e-5)
    assert np.array_equal(merge("model_stock", [along, -along * np.float32(0.9)], base), base)


def test_model_stock_by_row_is_model_stock_of_each_row() -> None:
    base, a, b = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    rows = merge("model_stock", [a, b], base, filter_wise=True)
    close(rows, np.stack([merge("model_stock", [a[i], b[i]], base[i]) for i in range(5)]))


@quick
@given(same_shape(2))
def test_ram_adds_what_is_unique_and_averages_what_is_shared(tensors: list[Array]) -> None:
    first, second = tensors
    flat = np.arange(first.size).reshape(first.shape)
    a, b = first * (flat % 2 == 0), second * (flat % 2 == 1)
    zero = np.zeros_like(first)
    threshold = 1e-5
    close(merge("ram", [a, b], zero), a * (np.abs(a) > threshold) + b * (np.abs(b) > threshold))
    close(merge("ram", [first, first, first], zero), first, 2e-5)
    close(merge("ramplus_tl", [first], zero), first, 2e-5)


@quick
@given(same_shape(2), st.floats(0, 8, width=32))
def test_nearswap_moves_by_at_most_t(tensors: list[Array], t: float) -> None:
    a, b = tensors
    merged = merge("nearswap", [b], a, t=t)
    assert np.all(np.abs(merged - a) <= min(t, np.inf) * (1 + 1e-6) + 1e-6)
    assert merge("nearswap", [b], a, t=1e9).tobytes() == b.tobytes()
    close(merge("nearswap", [b], a, t=0.0), a, 0)


def test_arcee_fusion_takes_the_important_changes_only() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(size=(30, 20)).astype(np.float32)
    model = base + generator.normal(size=base.shape).astype(np.float32) * 0.01
    model[3, 4] += 5
    merged = merge("arcee_fusion", [model], base)
    changed = merged != base
    assert changed[3, 4]
    assert 0 < changed.sum() < base.size / 3
    close(merged[changed], model[changed])


@quick
@given(same_shape(3))
def test_fisher_selects_averages_and_ignores_scale(tensors: list[Array]) -> None:
    a, b, raw = tensors
    statistic = np.abs(raw) + np.float32(0.1)
    close(merge("fisher", [a, b], statistics=[statistic, statistic]), merge("linear", [a, b]))
    close(merge("fisher", [a, b], statistics=[statistic, np.zeros_like(statistic)]), a)
    close(
        merge("fisher", [a, b], statistics=[statistic, 2 * statistic]), merge("fisher", [a, b], statistics=[5 * statistic, 10 * statistic])
    )
    close(merge("fisher", [a, b], statistics=[np.zeros_like(a), np.zeros_like(a)]), merge("linear", [a, b]))


def test_regmean_is_least_squares() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 5, 4)).astype(np.float32)
    inputs = generator.normal(size=(2, 40, 4))
    grams = [x.T @ x for x in inputs]
    merged = merge("regmean", [first, second], statistics=grams, alpha=1.0)
    targets = np.concatenate([x @ weight.T for x, weight in zip(inputs, (first, second), strict=True)])
    expected = np.linalg.lstsq(np.concatenate(inputs), targets, rcond=None)[0].T
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)
    close(merge("regmean", [first, second], statistics=[grams[0], grams[0]]), merge("linear", [first, second]))
    close(merge("regmean", [first, second]), merge("linear", [first, second]))


def gram_of(inputs: Array) -> Array:
    """As `ftcli merge-statistics` sums it: in float32."""
    return inputs.T @ inputs


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("num_tokens", [2, 40])
def test_regmean_of_equal_models_is_the_model_whatever_the_data(alpha: float, num_tokens: int) -> None:
    generator = np.random.default_rng(1)
    model = generator.normal(size=(5, 8)).astype(np.float32)
    inputs = generator.normal(size=(3, num_tokens, 8)).astype(np.float32)
    inputs[..., 3] = 0  # a unit that never fires
    for count in (1, 3):
        found = merge(
            "regmean", [model] * count, statistics=[gram_of(x) for x in inputs[:count]], alpha=alpha, weight=(0.4, 0.3, 0.3)[:count]
        )
        assert found.tobytes() == model.tobytes()


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_inputs_that_no_data_reached_keep_the_mean(alpha: float) -> None:
    generator = np.random.default_rng(2)
    models = list(generator.normal(size=(2, 5, 8)).astype(np.float32))
    inputs = generator.normal(size=(2, 40, 8)).astype(np.float32)
    inputs[..., [1, 6]] = 0
    found = merge("regmean", models, statistics=[gram_of(x) for x in inputs], weight=(3.0, 1.0), alpha=alpha)
    close(found[:, [1, 6]], (0.75 * models[0] + 0.25 * models[1])[:, [1, 6]])
    assert not np.allclose(found[:, 0], (0.75 * models[0] + 0.25 * models[1])[:, 0], atol=0.01) or alpha == 0


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-3, 1e3)])
def test_regmean_of_little_data_is_near_the_mean_and_no_worse_on_it(scales: tuple[float, float]) -> None:
    """Fewer tokens than inputs: what float32 leaves of directions without data is noise, also beside inputs of another size."""
    generator = np.random.default_rng(3)
    models = list(generator.normal(size=(2, 16, 64)).astype(np.float32))
    inputs = generator.normal(size=(2, 12, 64)).astype(np.float32)
    inputs[..., :32] *= np.float32(scales[0])
    inputs[..., 32:] *= np.float32(scales[1])
    found, mean = merge("regmean", models, statistics=[gram_of(x) for x in inputs], alpha=1.0), (models[0] + models[1]) / 2

    def error(merged: Array) -> float:
        pairs = zip(inputs.astype(np.float64), models, strict=True)
        return float(sum(np.linalg.norm(x @ (merged.astype(np.float64) - model).T) ** 2 for x, model in pairs))

    assert np.abs(found - mean).max() < 10
    assert error(found) < 1e-6 * error(mean)  # 24 tokens of 64 inputs can all be met


@pytest.mark.parametrize("number", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_statistics_that_are_none_are_refused(name: str, number: float) -> None:
    generator = np.random.default_rng(4)
    model = generator.normal(size=(8, 8)).astype(np.float32)
    statistic = np.ones((8, 8), np.float32)
    np.fill_diagonal(statistic, number)
    with pytest.raises(RunError, match=rf"tensor `a.tensor`: .*statistics(.|\n)*merge-statistics MODEL --kind {name}"):
        merge(name, [model, model + 1], statistics=[np.eye(8, dtype=np.float32), statistic])


@given(st.integers(0, 400), st.integers(1, 60), st.integers(0, 5))
@quick
def test_random_bits_are_those_of_the_position(start: int, count: int, model: int) -> None:
    randomness = Randomness(7, "layer.weight", tuple("abcdef"))
    assert np.array_equal(randomness.words(model, start, count), randomness.words(model, 0, 500)[start : start + count])
    assert not np.array_equal(randomness.words(model, 0, 64), Randomness(7, "other.weight", tuple("abcdef")).words(model, 0, 64))


def test_probabilities_of_zero_and_one_are_exact() -> None:
    randomness = Randomness(1, "a", ("model",))
    num = 2**19  # eight words that are all ones are expected among them, and eight that are zero
    assert not randomness.kept(0, 0, (1, num), Chances.of(0.0)).any()
    assert randomness.kept(0, 0, (1, num), Chances.of(1.0)).all()


def test_draws_that_the_first_word_does_not_decide_go_to_the_second() -> None:
    randomness = Randomness(1, "a", ("model",))
    num = 2**22
    words = randomness.words(0, 0, num)
    undecided = words == 100
    mask = randomness.kept(0, 0, (1, num), Chances.of((100 + 0.5) / 2**16)).reshape(-1)
    assert mask[words < 100].all()
    assert not mask[words > 100].any()
    assert 0.2 < mask[undecided].mean() < 0.8  # 64 draws of probability 0.5
    # in another order, and from another position, the same draws
    order = np.arange(2**10)[::-1].reshape(1, -1)
    start = int(np.flatnonzero(undecided)[5]) - 3
    turned = randomness.kept(0, start, (1, 2**10), Chances.of((100 + 0.5) / 2**16), order)
    assert np.array_equal(turned.reshape(-1)[::-1], mask[start : start + 2**10])


@given(st.integers(0, 2**15 - 2**8), st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]), st.booleans())
@quick
def test_bfloat16_rounds_to_the_nearest_even(upper: int, lower: int, negative: bool) -> None:
    import torch

    # around the middle between two neighbours, where roundings differ
    value = np.array([negative << 31 | upper << 16 | lower], np.uint32).view(np.float32)
    expected = torch.from_numpy(value.copy()).to(torch.bfloat16)
    assert np.array_equal(from_float32(value, "BF16"), expected.view(torch.uint16).numpy())
    assert np.array_equal(to_float32(from_float32(value, "BF16"), "BF16"), expected.float().numpy())


def test_values_that_would_become_infinite_do_not_fit() -> None:
    assert fits(np.array([65504.0], np.float32), "F16")
    assert not fits(np.array([70000.0], np.float32), "F16")
    assert not fits(np.array([np.nan], np.float32), "BF16")
    assert not fits(np.array([3.4e38], np.float32), "BF16")


@pytest.mark.parametrize("kind", ["even", "misleading", "equal"])
def test_a_sample_changes_nothing_of_which_values_are_the_largest(kind: str) -> None:
    generator = np.random.default_rng(0)
    delta = np.abs(generator.normal(size=(1200, 256))).astype(np.float32)
    if kind == "misleading":  # the rows that are looked at first are unlike all others
        delta[list(sampled_rows(*delta.shape) or ())] *= 100
    if kind == "equal":
        delta = np.floor(delta)
    base = np.zeros_like(delta)
    merged = merge("ties", [delta], base, density=0.3).reshape(-1)
    count = int(0.3 * delta.size)
    ranked = np.argsort(-delta.reshape(-1), kind="stable")[:count]
    expected = np.zeros(delta.size, np.float32)
    expected[ranked] = delta.reshape(-1)[ranked]
    assert np.array_equal(merged, expected)
    trimmed = merge("breadcrumbs", [delta], base, density=0.3, gamma=0.1).reshape(-1)
    assert np.count_nonzero(trimmed) == (count if kind != "equal" else np.count_nonzero(trimmed))
